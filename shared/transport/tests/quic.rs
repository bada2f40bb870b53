//! What only the real carrier can show: certificates at the handshake, cuts of whole connections, moving to another
//! socket, reloading. Neighbours: `contract.rs` runs the common suite.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;

use commonweal_protocol::{DeviceId, Enrolled, Invitation, Poll, Request};
use commonweal_transport::{
    Authority, Clock, Credentials, DeviceKey, Handler, Link, LinkError, LinkLimits, Purpose, QuicLink,
    QuicServer, QuicWire, ServeLimits, Wire, enroll,
};
use reference::{BASE, Reference, announce, bytes};
use std::{net::SocketAddr, sync::Arc, time::Duration};

const NOW_MS: u64 = 1_767_225_600_000;
const POLL: Poll = Poll { base: BASE, installed: None };

struct World {
    authority: Arc<Authority>,
    clock: Clock,
    handler: Arc<Reference>,
    server: QuicServer,
}

impl World {
    fn start() -> Self {
        Self::start_with(ServeLimits::default())
    }

    fn start_with(limits: ServeLimits) -> Self {
        let clock = Clock::manual(NOW_MS);
        let authority = Arc::new(Authority::create(NOW_MS).unwrap());
        let handler = Arc::new(Reference::new(Arc::clone(&authority), clock.clone()));
        let server = serve(&authority, &clock, &handler, ([127, 0, 0, 1], 0).into(), limits);
        Self { authority, clock, handler, server }
    }

    fn limits() -> LinkLimits {
        LinkLimits { retry_first_ms: 10, retry_pause_ms_max: 200, retries_max: 50, ..LinkLimits::default() }
    }

    fn invitation(&self) -> Invitation {
        let address = self.server.local_addr();
        let (host, port) = (address.ip().to_string().parse().unwrap(), address.port());
        Invitation { host, port, token: self.handler.invite(), authority: self.authority.digest() }
    }

    async fn enrol(&self) -> Credentials {
        let invitation: Invitation = self.invitation().to_string().parse().unwrap();
        enroll(&invitation, DeviceKey::generate().unwrap(), &Self::limits(), &self.clock).await.unwrap()
    }

    fn link(&self, credentials: Credentials) -> QuicLink {
        let port = self.server.local_addr().port();
        QuicLink::new("localhost", port, credentials, Self::limits(), self.clock.clone()).unwrap()
    }
}

fn serve<H: Handler>(
    authority: &Authority,
    clock: &Clock,
    handler: &Arc<H>,
    address: SocketAddr,
    limits: ServeLimits,
) -> QuicServer {
    let identity = authority.issue_server(clock.unix_ms(), 30 * 24 * 3_600_000).unwrap();
    QuicServer::bind(address, identity, Arc::clone(handler), limits, clock.clone()).unwrap()
}

/// Enrolled devices have their own ALPN, and without a certificate nobody gets in there.
#[tokio::test]
async fn a_stranger_gets_no_answer_where_a_certificate_is_needed() {
    let world = World::start();
    // A self-signed device: the chain ends in an authority of its own making, the pin is the right one's.
    let other = Authority::create(NOW_MS).unwrap();
    let key = DeviceKey::generate().unwrap();
    let device = DeviceId([1; 16]);
    let chain = other.issue_device(&key.csr().unwrap(), device, NOW_MS, 3_600_000).unwrap();
    let signing_key = world.handler.signing_key();
    let enrolled = Enrolled { device, chain, signing_key };
    let error = Credentials::new(key, &enrolled, world.authority.digest()).unwrap_err();
    assert!(error.to_string().contains("authority"), "{error}");
    // A request of a device, on the ALPN of strangers.
    let port = world.server.local_addr().port();
    let limits = World::limits();
    let wire =
        QuicWire::enrolment("127.0.0.1", port, world.authority.digest(), &world.clock, &limits).unwrap();
    let mut stream = wire.open(Purpose::Question).await.unwrap();
    let frame = commonweal_protocol::encode(&Request::Poll(POLL)).unwrap();
    stream.sending.write_all(&frame).await.unwrap();
    let answer = stream.receiving.read_to_end(1000).await.unwrap();
    let reply: commonweal_protocol::EnrolmentReply = commonweal_protocol::decode(&answer[4..]).unwrap();
    assert!(matches!(reply, commonweal_protocol::EnrolmentReply::Refused(_)), "{reply:?}");
}

/// The aggregator goes away in the middle of an upload and comes back at the same address: the upload goes on.
#[tokio::test]
async fn an_upload_outlives_the_aggregators_restart() {
    let world = World::start();
    let credentials = world.enrol().await;
    let link = world.link(credentials.clone());
    let payload = bytes(20_000_000, 9);
    let open = announce(&payload);
    let address = world.server.local_addr();
    let World { authority, clock, handler, server } = world;
    handler.pause_at(3_000_000);
    let restart = async {
        while handler.uploaded_bytes() < 3_000_000 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(server);
        handler.pause_at(usize::MAX);
        // The socket is free once the old endpoint's driver is gone.
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let identity = authority.issue_server(NOW_MS, 3_600_000).unwrap();
            let limits = ServeLimits::default();
            match QuicServer::bind(address, identity, Arc::clone(&handler), limits, clock.clone()) {
                Ok(server) => break server,
                Err(error) => eprintln!("{error}: {:?}", std::error::Error::source(&error)),
            }
        }
    };
    let (uploaded, _server) = tokio::join!(link.upload(&open, &payload), restart);
    let uploaded = uploaded.unwrap();
    uploaded.receipt.verify(credentials.signing_key()).unwrap();
    // Not all was sent twice: the second part went on where the first had ended.
    assert!(uploaded.sent_bytes < 2 * open.length, "{uploaded:?}");
    let state = handler.state();
    assert!(state.accepted.values().next().unwrap().0 == payload);
}

/// A device that changes its network moves its connections to another socket.
#[tokio::test]
async fn a_link_survives_another_socket() {
    let world = World::start();
    let link = world.link(world.enrol().await);
    link.poll(POLL).await.unwrap();
    link.rebind().await.unwrap();
    link.poll(POLL).await.unwrap();
}

/// A fresh server certificate is used by connections made from then on, and the old ones go on.
#[tokio::test]
async fn the_aggregators_certificate_is_reloaded() {
    let world = World::start();
    let credentials = world.enrol().await;
    let old = world.link(credentials.clone());
    old.poll(POLL).await.unwrap();
    // Past the first certificate, and the device's: both are issued anew.
    let later_ms = NOW_MS + 31 * 24 * 3_600_000;
    world.clock.set(later_ms);
    let key = DeviceKey::generate().unwrap();
    let chain =
        world.authority.issue_device(&key.csr().unwrap(), credentials.device(), later_ms, 3_600_000).unwrap();
    let fresh = credentials.renewed(key, &chain).unwrap();
    let error = world.link(fresh.clone()).poll(POLL).await.unwrap_err();
    assert!(matches!(error, LinkError::Untrusted { .. }), "{error:?}");
    world.server.reload(world.authority.issue_server(later_ms, 3_600_000).unwrap()).unwrap();
    world.link(fresh).poll(POLL).await.unwrap();
}

/// Above the threshold of handshakes, newcomers prove their address first, and get in.
#[tokio::test]
async fn newcomers_prove_their_address_under_load() {
    let world = World::start_with(ServeLimits { handshakes_before_retry: 0, ..ServeLimits::default() });
    let link = world.link(world.enrol().await);
    link.poll(POLL).await.unwrap();
}

/// Nobody there: an error that says where, after the retries.
#[tokio::test]
async fn an_aggregator_that_is_not_there_is_unreachable() {
    let world = World::start();
    let credentials = world.enrol().await;
    let limits = LinkLimits { stall_ms: 100, retries_max: 1, ..World::limits() };
    // Port 9 is "discard"; nothing answers QUIC there.
    let link = QuicLink::new("127.0.0.1", 9, credentials, limits, world.clock.clone()).unwrap();
    let error = link.poll(POLL).await.unwrap_err();
    assert!(
        matches!(&error, LinkError::Unreachable { address, .. } if address == "127.0.0.1:9"),
        "{error:?}"
    );
}

/// Requests under way are answered before the server is gone.
#[tokio::test]
async fn closing_lets_requests_end() {
    let world = World::start();
    let link = Arc::new(world.link(world.enrol().await));
    let payload = bytes(5_000_000, 3);
    let open = announce(&payload);
    world.handler.pause_at(1);
    let upload = {
        let (link, payload) = (Arc::clone(&link), payload.clone());
        tokio::spawn(async move { link.upload(&open, &payload).await })
    };
    while world.handler.uploaded_bytes() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let release = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        world.handler.pause_at(usize::MAX);
    };
    tokio::join!(world.server.close(), release);
    upload.await.unwrap().unwrap();
}

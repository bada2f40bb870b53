//! What only the real carrier can show: certificates at the handshake, cuts of whole connections, moving to another
//! socket, reloading. Neighbours: `contract.rs` runs the common suite.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;

use commonweal_protocol::{
    Content, DeviceId, Digest, Enrolled, Invitation, KeyNumber, Poll, Refusal, Request,
};
use commonweal_transport::{
    Authority, Clock, Credentials, DeviceKey, Handler, Link, LinkError, LinkLimits, Purpose, QuicLink,
    QuicServer, QuicWire, ServeLimits, Wire, enroll,
};
use reference::{BASE, Reference, announce, bytes};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

const NOW_MS: u64 = 1_767_225_600_000;
const POLL: Poll = Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None };

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
    let enrolled = Enrolled { device, chain, signing_key, key_number: KeyNumber(0) };
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

/// The way of a device's socket dies in the middle of a transfer, and nobody tells the device: the same connection goes on
/// over another socket, and nothing is sent twice but what was lost. No retry is allowed here.
#[tokio::test]
async fn a_transfer_goes_on_by_itself_when_its_path_dies() {
    for host in ["127.0.0.1", "::1"] {
        let address = SocketAddr::new(host.parse().unwrap(), 0);
        if std::net::UdpSocket::bind(address).is_err() {
            eprintln!("this machine has no {host}");
            continue;
        }
        let world = World::start();
        let credentials = world.enrol().await;
        let server = serve(&world.authority, &world.clock, &world.handler, address, ServeLimits::default());
        let link = |port| {
            let limits = LinkLimits { retries_max: 0, ..World::limits() };
            QuicLink::new(host, port, credentials.clone(), limits, world.clock.clone()).unwrap()
        };
        let silent = Arc::new(AtomicBool::new(false));
        let uploading = link(forgetful_relay(server.local_addr(), Arc::clone(&silent)).await.port());
        let payload = bytes(40_000_000, 9);
        let open = announce(&payload);
        let (uploaded, at) = tokio::join!(uploading.upload(&open, &payload), async {
            while world.handler.uploaded_bytes() < 1_000_000 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            silent.store(true, Ordering::SeqCst);
            world.handler.uploaded_bytes()
        });
        assert!(at < payload.len(), "the upload was over before its path died");
        assert_eq!(uploaded.unwrap().sent_bytes, open.length);
        // Whoever only receives says something by its keep-alive.
        let silent = Arc::new(AtomicBool::new(false));
        let relay = relay_that_forgets(server.local_addr(), Arc::clone(&silent), 1_000_000).await;
        let fetching = link(relay.port());
        let published = world.handler.published().to_vec();
        let content = Content { digest: Digest::of(&published), length: published.len() as u64 };
        let mut partial = Vec::new();
        fetching.fetch(content, &mut partial).await.unwrap();
        assert!(silent.load(Ordering::SeqCst) && partial == published);
    }
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

/// A way to the server from another address, 127.0.0.2; lets only so many packets of the device through.
async fn relay(server: SocketAddr, packets_max: usize) -> SocketAddr {
    let near = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let far = tokio::net::UdpSocket::bind("127.0.0.2:0").await.unwrap();
    far.connect(server).await.unwrap();
    let address = near.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut out, mut back) = ([0; 2048], [0; 2048]);
        let (mut device, mut passed) = (None, 0);
        loop {
            tokio::select! {
                Ok((length, from)) = near.recv_from(&mut out) => {
                    device = Some(from);
                    if passed < packets_max {
                        passed += 1;
                        let _ = far.send(&out[..length]).await;
                    }
                }
                Ok(length) = far.recv(&mut back) => {
                    if let Some(device) = device {
                        let _ = near.send_to(&back[..length], device).await;
                    }
                }
            }
        }
    });
    address
}

/// Strangers who stand still take the slots of their own address only, in which one can still enrol from another.
#[tokio::test]
async fn one_address_does_not_hold_every_enrolment() {
    let world = World::start_with(ServeLimits { enrolments_max: 16, ..ServeLimits::default() });
    let (port, limits) = (world.server.local_addr().port(), World::limits());
    let authority = world.authority.digest();
    let mut idle = Vec::new();
    for _ in 0..16 {
        let wire = QuicWire::enrolment("127.0.0.1", port, authority, &world.clock, &limits).unwrap();
        // A stream that is opened and never used; or none, if the server has hung up by then.
        let stream = wire.open(Purpose::Question).await;
        idle.push((wire, stream));
    }
    let enrol = |invitation: Invitation| async move {
        let limits = World::limits();
        enroll(&invitation, DeviceKey::generate().unwrap(), &limits, &Clock::manual(NOW_MS)).await
    };
    let here = world.invitation();
    assert!(enrol(here.clone()).await.is_err(), "this address has used up its share");
    let port = relay(world.server.local_addr(), usize::MAX).await.port();
    enrol(Invitation { port, ..here }).await.unwrap();
    // Whoever hangs up makes room.
    drop(idle);
    world.enrol().await;
}

/// Whoever is shut out takes no seat of those who are not, whether revoked before it connects or while it is connected.
#[tokio::test]
async fn a_revoked_device_holds_no_connection() {
    let world = World::start_with(ServeLimits { connections_max: 1, ..ServeLimits::default() });
    let (revoked, other) = (world.enrol().await, world.enrol().await);
    let connected = world.link(revoked.clone());
    connected.poll(POLL).await.unwrap();
    world.handler.revoke(revoked.device());
    // It hears of it, and its seat is free.
    assert_eq!(connected.poll(POLL).await.unwrap_err().refusal(), Some(Refusal::Revoked));
    let link = world.link(other.clone());
    link.poll(POLL).await.unwrap();
    link.wire().let_go().await;
    // Connected, and asks nothing.
    let port = world.server.local_addr().port();
    let idle = QuicWire::device("localhost", port, revoked.clone(), world.clock.clone(), &World::limits());
    let idle = idle.unwrap();
    let stream = idle.open(Purpose::Question).await.unwrap();
    world.link(other).poll(POLL).await.unwrap();
    drop(stream);
    let error = world.link(revoked).poll(POLL).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::Revoked), "{error:?}");
}

/// Handshakes that are never ended take the slots of their own address only.
#[tokio::test]
async fn one_address_does_not_hold_every_handshake() {
    let world = World::start();
    let credentials = world.enrol().await;
    let limits = ServeLimits { handshakes_before_retry: 0, ..ServeLimits::default() };
    let address = ([127, 0, 0, 1], 0).into();
    let server = serve(&world.authority, &world.clock, &world.handler, address, limits);
    let link = |port| {
        let (credentials, clock) = (credentials.clone(), world.clock.clone());
        QuicLink::new("127.0.0.1", port, credentials, World::limits(), clock).unwrap()
    };
    for _ in 0..8 {
        // Its first packet, and the same again with the proof of its address.
        let link = link(relay(server.local_addr(), 2).await.port());
        tokio::spawn(async move { link.poll(POLL).await });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    link(server.local_addr().port()).poll(POLL).await.unwrap();
}

/// An aggregator that died without a word: the first retry goes over a connection of its own, and does not wait for the
/// one that is kept to idle out.
#[tokio::test]
async fn a_connection_that_went_silent_is_let_go() {
    let world = World::start();
    let credentials = world.enrol().await;
    let silent = Arc::new(AtomicBool::new(false));
    let port = forgetful_relay(world.server.local_addr(), Arc::clone(&silent)).await.port();
    let limits = LinkLimits { stall_ms: 1_000, retries_max: 1, ..World::limits() };
    let link = QuicLink::new("127.0.0.1", port, credentials, limits, world.clock.clone()).unwrap();
    link.poll(POLL).await.unwrap();
    silent.store(true, Ordering::SeqCst);
    link.poll(POLL).await.unwrap();
}

/// A way to the server that, once `silent` is set, drops whatever belongs to connections from before.
async fn forgetful_relay(server: SocketAddr, silent: Arc<AtomicBool>) -> SocketAddr {
    relay_that_forgets(server, silent, usize::MAX).await
}

/// The same, which sets it by itself once so many bytes of a connection came back.
async fn relay_that_forgets(server: SocketAddr, silent: Arc<AtomicBool>, back_max: usize) -> SocketAddr {
    let any = SocketAddr::from((server.ip(), 0));
    let near = Arc::new(tokio::net::UdpSocket::bind(any).await.unwrap());
    let address = near.local_addr().unwrap();
    tokio::spawn(async move {
        let mut ways = BTreeMap::new();
        let mut packet = [0; 2048];
        while let Ok((length, device)) = near.recv_from(&mut packet).await {
            let (far, is_old) = match ways.entry(device) {
                Entry::Occupied(way) => way.into_mut(),
                Entry::Vacant(none) => {
                    let far = Arc::new(tokio::net::UdpSocket::bind(any).await.unwrap());
                    far.connect(server).await.unwrap();
                    let is_old = !silent.load(Ordering::SeqCst);
                    let (near, silent, back) = (Arc::clone(&near), Arc::clone(&silent), Arc::clone(&far));
                    tokio::spawn(async move {
                        let (mut packet, mut passed) = ([0; 2048], 0);
                        while let Ok(length) = back.recv(&mut packet).await {
                            passed += length;
                            if is_old && passed > back_max {
                                silent.store(true, Ordering::SeqCst);
                            }
                            if !(is_old && silent.load(Ordering::SeqCst)) {
                                let _ = near.send_to(&packet[..length], device).await;
                            }
                        }
                    });
                    none.insert((far, is_old))
                }
            };
            if !(*is_old && silent.load(Ordering::SeqCst)) {
                let _ = far.send(&packet[..length]).await;
            }
        }
    });
    address
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

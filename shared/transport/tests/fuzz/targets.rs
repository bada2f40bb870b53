//! What must hold for any bytes at all. Run by `../fuzz.rs` and by the targets in `fuzz/`.
//!
//! `authority.pem` and `device.pem` are a federation of the tests' own (see `../fuzz.rs`): nothing else trusts those
//! keys.

#[path = "../reference/mod.rs"]
mod reference;

use commonweal_protocol::{
    CertificateChain, Csr, DecodeError, DeviceId, Digest, Enroll, Enrolled, EnrolmentReply, EnrolmentRequest,
    Fetch, Header, KeyNumber, Message, Opaque, Poll, Renew, Reply, Request, Token, bounds, decode, encode,
};
use commonweal_transport::{
    Authority, Clock, Credentials, Faults, Purpose, ServeLimits, SimNetwork, SimWire, Wire,
};
use reference::{BASE, Reference, announce, bytes};
use std::sync::Arc;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    runtime::{Builder, Runtime},
};

/// When the federation was made, ms since 1970.
pub(crate) const NOW_MS: u64 = 1_767_225_600_000;
/// How long its device's certificate is valid.
pub(crate) const LIFE_MS: u64 = 100 * 365 * 24 * 3_600_000;
/// Its device.
pub(crate) const DEVICE: DeviceId = DeviceId([0x11; 16]);

/// An aggregator without a disk and one device that may ask it.
struct World {
    runtime: Runtime,
    authority: Arc<Authority>,
    credentials: Credentials,
    handler: Arc<Reference>,
    network: Arc<SimNetwork<Arc<Reference>>>,
    device: SimWire<Arc<Reference>>,
}

thread_local! {
    static WORLD: World = World::new();
}

impl World {
    fn new() -> Self {
        let authority =
            Arc::new(Authority::from_pem(include_str!("authority.pem")).expect("the tests' authority"));
        let credentials = Credentials::from_pem(include_str!("device.pem")).expect("the tests' device");
        let clock = Clock::manual(NOW_MS);
        let handler = Arc::new(Reference::new(Arc::clone(&authority), clock.clone()));
        let identity = authority.issue_server(NOW_MS, LIFE_MS).expect("a server's certificate");
        let (limits, faults) = (ServeLimits::default(), Faults::none());
        let network = SimNetwork::new(Arc::clone(&handler), identity, clock, &limits, faults)
            .expect("an authority that is trusted");
        let device = network.device(credentials.clone()).expect("credentials that can be shown");
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        Self { runtime, authority, credentials, handler, network, device }
    }

    /// Says these bytes on a fresh stream; what came back.
    fn say(&self, wire: &SimWire<Arc<Reference>>, said: &[u8]) -> Vec<u8> {
        self.runtime.block_on(async {
            let stream = wire.open(Purpose::Transfer).await.expect("the device is let in");
            let (mut sending, mut receiving) = (stream.sending, stream.receiving);
            let saying = async move {
                // Whoever refuses stops reading first.
                let _ = sending.write_all(said).await;
                let _ = sending.shutdown().await;
            };
            let mut answer = Vec::new();
            let (read, ()) = tokio::join!(receiving.read_to_end(&mut answer), saying);
            read.expect("a stream ends and does not break");
            self.network.settle().await;
            answer
        })
    }

    fn open(&self, credentials: Credentials) -> bool {
        let Ok(wire) = self.network.device(credentials) else { return false };
        self.runtime.block_on(async {
            let opened = wire.open(Purpose::Question).await.is_ok();
            self.network.settle().await;
            opened
        })
    }
}

/// Whatever is said on a stream, by a device or by a stranger who enrols: what comes back is whole messages.
pub(crate) fn stream(said: &[u8]) {
    WORLD.with(|world| {
        whole_messages::<Reply>(&world.say(&world.device, said));
        world.handler.invite();
        let stranger = world.network.enrolment(world.authority.digest());
        whole_messages::<EnrolmentReply>(&world.say(&stranger, said));
        *world.handler.state() = reference::State::default();
    });
}

fn whole_messages<M: Message>(mut bytes: &[u8]) {
    while let Some((header, rest)) = bytes.split_first_chunk::<{ Header::BYTES }>() {
        let header = Header::parse(*header, bounds::FRAME_BYTES_MAX).expect("a length within its bound");
        let (body, rest) = rest.split_at(header.body_bytes());
        let decoded: Result<M, DecodeError> = decode(body);
        decoded.expect("a message within its bounds");
        bytes = rest;
    }
    assert!(bytes.is_empty(), "a part of a header");
}

/// A signing request is refused with an error that can be shown, or is certified for the device that it is given to.
pub(crate) fn csr(bytes: &[u8]) {
    let Ok(csr) = Csr::new(bytes.to_vec()) else { return };
    WORLD.with(|world| match world.authority.issue_device(&csr, DEVICE, NOW_MS, LIFE_MS) {
        Ok(chain) => assert_eq!(Digest::of(&chain.0[1]), world.authority.digest()),
        Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
    });
}

/// A file of keys and certificates, of either side, is refused with an error that can be shown, or is the same when it is
/// written and read again.
pub(crate) fn identity(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Authority::from_pem(text) {
        Ok(authority) => {
            let again = Authority::from_pem(&authority.to_pem()).expect("it is read again");
            assert_eq!(again.digest(), authority.digest());
        }
        Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
    }
    match Credentials::from_pem(text) {
        Ok(credentials) => {
            let again = Credentials::from_pem(&credentials.to_pem()).expect("they are read again");
            assert_eq!(again.device(), credentials.device());
        }
        Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
    }
}

/// Bytes in place of a device's certificate, or of the authority's, are refused or name the device that was certified;
/// with a certificate that says anything else than the authority signed nobody gets in.
pub(crate) fn certificate(bytes: &[u8]) {
    let Ok(shown) = Opaque::new(bytes.to_vec()) else { return };
    WORLD.with(|world| {
        let (device, authority) = chain(&world.credentials);
        let signing_key = *world.credentials.signing_key();
        // What comes before the signature (72 bytes at most, and its wrapping) and after the length of the whole.
        let said = 4..device.len() - 80;
        for (own, last) in [(shown.clone(), authority), (device.clone(), shown)] {
            let (pin, is_as_signed) = (Digest::of(&last), own.get(said.clone()) == device.get(said.clone()));
            let enrolled = Enrolled {
                device: DEVICE,
                chain: CertificateChain(vec![own, last]),
                signing_key,
                key_number: KeyNumber(0),
            };
            match Credentials::new(world.credentials.key().clone(), &enrolled, pin) {
                Ok(credentials) => {
                    assert_eq!(credentials.device(), DEVICE);
                    assert!(!world.open(credentials) || is_as_signed, "a forged certificate is let in");
                }
                Err(error) => assert!(error.to_string().len() < 1000, "{error}"),
            }
        }
    });
}

type Der = Opaque<{ bounds::CERTIFICATE_BYTES_MAX }>;

/// The certificates of the tests' device and authority.
pub(crate) fn chain(credentials: &Credentials) -> (Der, Der) {
    let pem = credentials.to_pem();
    let ders: Vec<Der> = pem::parse_many(pem.as_bytes())
        .expect("PEM of our own")
        .into_iter()
        .filter(|part| part.tag() == "CERTIFICATE")
        .map(|part| Opaque::new(part.into_contents()).expect("a certificate of our own"))
        .collect();
    let [device, authority] = <[Der; 2]>::try_from(ders).expect("two certificates");
    (device, authority)
}

/// The seeds that this crate can make anew, by file name below `fuzz/seeds`.
pub(crate) fn seeds() -> Vec<(String, Vec<u8>)> {
    let credentials = Credentials::from_pem(include_str!("device.pem")).expect("the tests' device");
    let (device, authority) = chain(&credentials);
    let csr = credentials.key().csr().expect("a signing request");
    let payload = bytes(40, 1);
    let published = Digest::of(&bytes(2_500_000, 2));
    let chunk = |offset: u64, bytes: &[u8]| {
        Request::Chunk(commonweal_protocol::Chunk::new(offset, bytes.to_vec()).expect("a chunk"))
    };
    let streams = [
        ("poll", vec![Request::Poll(Poll { base: BASE, installed: None, key: KeyNumber(0), trouble: None })]),
        (
            "upload",
            vec![
                Request::Open(announce(&payload)),
                chunk(0, &payload[..24]),
                chunk(24, &payload[24..]),
                Request::Finish,
            ],
        ),
        ("fetch", vec![Request::Fetch(Fetch { digest: published, offset: 2_499_000 })]),
        ("renew", vec![Request::Renew(Renew { csr: csr.clone() })]),
    ];
    let mut seeds = vec![
        ("certificate/device".to_owned(), device.to_vec()),
        ("certificate/authority".to_owned(), authority.to_vec()),
        ("csr/device".to_owned(), csr.to_vec()),
    ];
    let frames = |requests: Vec<Request>| -> Vec<u8> {
        requests.iter().flat_map(|request| encode(request).expect("a request in its bounds")).collect()
    };
    seeds.extend(streams.map(|(name, requests)| (format!("stream/{name}"), frames(requests))));
    let enroll = EnrolmentRequest::Enroll(Enroll { token: Token([1; 32]), csr });
    seeds.push(("stream/enroll".to_owned(), encode(&enroll).expect("a request in its bounds")));
    seeds
}

//! Rotation of the key that signs for the aggregator, over real QUIC: devices that were away catch up by the chain and
//! refuse every other; a kill in the midst of a rotation leaves keys that sign and that devices can follow.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

use aggregator::{directory::Directory, events::Events, pause, receive::handler::Service, round::Policy};
use commonweal_protocol::{
    Accepted, AggregatorKey, CertificateChain, Chunk, Csr, Enroll, Enrolled, Fetch, Invitation, KeyNumber,
    Lineage, Open, Poll, PollReply, Refused, SignedRelease, SignedSuccession, SigningKey, Succession,
    SuccessionError, UploadKey, Version,
};
use commonweal_tests::{
    federation::Federation,
    modelless::{self, Modelless},
    program::{Finished, Running, command},
    visitor::{self, BASE, Visitor},
};
use commonweal_transport::{
    ContentPart, Credentials, Handler, LinkLimits, Opened, Peer, QuicServer, ServeLimits,
};
use edge_client::{install, trust::TrustError};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const NOW_MS: u64 = 1_700_000_000_000;

/// What an impostor says in place of the aggregator.
#[derive(Clone, Default)]
struct Forgery {
    steps: Vec<SignedSuccession>,
    /// Signs the release anew.
    key: Option<SigningKey>,
}

/// The aggregator's answers, with a forgery in them if there is one: whoever holds its certificate can do that.
struct Impostor {
    service: Service,
    forgery: Arc<Mutex<Option<Forgery>>>,
}

impl Handler for Impostor {
    async fn admit(&self, peer: &Peer) -> Result<(), Refused> {
        self.service.admit(peer).await
    }

    async fn poll(&self, peer: &Peer, poll: Poll) -> Result<PollReply, Refused> {
        let reply = self.service.poll(peer, poll).await?;
        let Some(Forgery { steps, key }) = self.forgery.lock().unwrap().clone() else { return Ok(reply) };
        let resigned = |signed: SignedRelease| match &key {
            Some(key) => SignedRelease::sign(key, signed.release).unwrap(),
            None => signed,
        };
        Ok(PollReply { task: None, release: reply.release.map(resigned), successions: steps, ..reply })
    }

    async fn open(&self, peer: &Peer, open: Open) -> Result<Opened, Refused> {
        self.service.open(peer, open).await
    }

    async fn chunk(&self, peer: &Peer, key: UploadKey, chunk: Chunk) -> Result<u64, Refused> {
        self.service.chunk(peer, key, chunk).await
    }

    async fn finish(&self, peer: &Peer, key: UploadKey) -> Result<Accepted, Refused> {
        self.service.finish(peer, key).await
    }

    async fn read(&self, peer: &Peer, fetch: Fetch, length_max: usize) -> Result<ContentPart, Refused> {
        self.service.read(peer, fetch, length_max).await
    }

    async fn renew(&self, peer: &Peer, csr: Csr) -> Result<CertificateChain, Refused> {
        self.service.renew(peer, csr).await
    }

    async fn enroll(&self, enroll: Enroll) -> Result<Enrolled, Refused> {
        self.service.enroll(enroll).await
    }
}

/// An aggregator at a port, whose rounds never fill.
struct World {
    place: TempDir,
    aggregator: Modelless,
    server: QuicServer,
    forgery: Arc<Mutex<Option<Forgery>>>,
}

impl World {
    fn start() -> Self {
        let place = tempfile::tempdir().unwrap();
        let config = modelless::config(Policy { goal: 8, wait_ms: 0, ..Policy::default() });
        let aggregator =
            Modelless::open(&place.path().join("aggregator"), 1, config, Events::to(|_| ())).unwrap();
        let forgery: Arc<Mutex<Option<Forgery>>> = Arc::default();
        let impostor = Impostor { service: aggregator.service(), forgery: forgery.clone() };
        let server = aggregator.bind(0, impostor, ServeLimits::default()).unwrap();
        Self { place, aggregator, server, forgery }
    }

    async fn enrolled(&self) -> Credentials {
        let invitation = self.aggregator.invite(1, self.server.local_addr()).unwrap().pop().unwrap();
        let invitation: Invitation = invitation.parse().unwrap();
        visitor::enroll(&invitation, &LinkLimits::default()).await.unwrap()
    }

    /// The device with these credentials, at its start.
    fn device(&self, name: &str, credentials: &Credentials) -> Visitor {
        let port = self.server.local_addr().port();
        let federation = (BASE, visitor::layout(1).unwrap());
        let place = self.place.path().join(name);
        Visitor::new(("127.0.0.1", port), credentials.clone(), federation, &place, LinkLimits::default())
            .unwrap()
    }

    /// As `aggregator keys rotate` does beside a server.
    fn rotate(&self) {
        Directory::open(self.aggregator.directory().path()).unwrap().rotate(NOW_MS, |_| ()).unwrap();
    }

    fn roll_back(&self) -> Version {
        self.aggregator.parts().publisher.roll_back(Version(0), NOW_MS).unwrap().release.version
    }
}

async fn visit(device: &mut Visitor) -> anyhow::Result<visitor::Visit> {
    device.visit(|task| visitor::noise(&visitor::layout(1)?, &mut ChaCha8Rng::seed_from_u64(task.seed))).await
}

/// The number of the key that a device trusts, and the release that it has.
fn holds(device: &Visitor) -> (u64, Option<Version>) {
    let (expected, store) = device.expected();
    (expected.trust.number().0, install::installed_version(store, expected).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_of_before_two_rotations_installs_the_release_after_them() {
    let world = World::start();
    let credentials = world.enrolled().await;
    let mut device = world.device("device", &credentials);
    visit(&mut device).await.unwrap();
    assert_eq!(holds(&device), (0, Some(Version(0))));

    world.rotate();
    world.rotate();
    assert_eq!(world.roll_back(), Version(1));
    visit(&mut device).await.unwrap();
    assert_eq!(holds(&device), (2, Some(Version(1))));
    // It is on its disk.
    drop(device);
    let mut device = world.device("device", &credentials);
    assert_eq!(holds(&device), (2, Some(Version(1))));
    visit(&mut device).await.unwrap();

    // Whoever enrols now begins with the key in force, and goes on from there.
    let credentials = world.enrolled().await;
    assert_eq!(credentials.lineage().first_number(), KeyNumber(2));
    let mut late = world.device("late", &credentials);
    visit(&mut late).await.unwrap();
    assert_eq!(holds(&late), (2, Some(Version(1))));
    world.rotate();
    for device in [&mut late, &mut device] {
        visit(device).await.unwrap();
        assert_eq!(holds(device), (3, Some(Version(1))));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_refuses_every_chain_but_its_own() {
    let world = World::start();
    let credentials = world.enrolled().await;
    let mut device = world.device("device", &credentials);
    visit(&mut device).await.unwrap();
    world.rotate();
    visit(&mut device).await.unwrap();
    world.rotate();
    world.rotate();
    world.roll_back();
    let genuine = world.aggregator.parts().signer.keys().lineage().clone();
    let thief = SigningKey::from_bytes(&[66; 32]);
    let forged = |number, by: &SigningKey| {
        let step =
            Succession { number: KeyNumber(number), key: AggregatorKey::of(&thief), created_ms: NOW_MS };
        SignedSuccession::sign(by, step).unwrap()
    };
    let steps = |steps: &[SignedSuccession]| Forgery { steps: steps.to_vec(), key: Some(thief.clone()) };
    let chains = [
        ("a stranger's", steps(&[forged(2, &thief)])),
        ("one that forks after a genuine step", steps(&[genuine.steps()[1], forged(3, &thief)])),
        ("one that skips", steps(&genuine.steps()[2..])),
        ("one that goes back", steps(genuine.steps())),
        ("one that repeats", steps(&[genuine.steps()[1], genuine.steps()[1]])),
    ];
    for (which, forgery) in chains {
        *world.forgery.lock().unwrap() = Some(forgery);
        let error = visit(&mut device).await.unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(TrustError::Succession(_))), "{which}: {error:#}");
        assert_eq!(holds(&device), (1, Some(Version(0))), "{which}");
    }
    // Without a step, and with the whole genuine chain before it.
    for steps in [vec![], genuine.steps()[1..].to_vec()] {
        *world.forgery.lock().unwrap() = Some(Forgery { steps, key: Some(thief.clone()) });
        let error = visit(&mut device).await.unwrap_err();
        let error = error.downcast_ref::<install::InstallError>().unwrap();
        assert!(matches!(error, install::InstallError::Signature { .. }), "{error}");
    }
    *world.forgery.lock().unwrap() = None;
    visit(&mut device).await.unwrap();
    assert_eq!(holds(&device), (3, Some(Version(1))), "nothing of it was left");
}

/// docs/threats.md: whom the thief of a key can deceive, and whom not any more.
#[tokio::test(flavor = "multi_thread")]
async fn the_thief_of_a_key_deceives_a_device_that_has_not_heard_of_its_successor_and_no_other() {
    let world = World::start();
    let stolen = aggregator_key(world.aggregator.directory());
    let (one, other) = (world.enrolled().await, world.enrolled().await);
    let (mut informed, mut away) = (world.device("informed", &one), world.device("away", &other));
    for device in [&mut informed, &mut away] {
        visit(device).await.unwrap();
    }
    world.rotate();
    visit(&mut informed).await.unwrap();
    world.roll_back();

    let thief = SigningKey::from_bytes(&[66; 32]);
    let step = Succession { number: KeyNumber(1), key: AggregatorKey::of(&thief), created_ms: NOW_MS };
    let steps = vec![SignedSuccession::sign(&stolen, step).unwrap()];
    // By the stolen key itself, or by one that follows it in the thief's chain.
    let by_stolen = Forgery { steps: vec![], key: Some(stolen) };
    let by_thief = Forgery { steps, key: Some(thief) };
    for forgery in [&by_stolen, &by_thief] {
        *world.forgery.lock().unwrap() = Some(forgery.clone());
        let error = visit(&mut informed).await.unwrap_err();
        assert_eq!(holds(&informed), (1, Some(Version(0))), "{error:#}");
    }
    let error = visit(&mut informed).await.unwrap_err();
    let fork = Some(SuccessionError::Fork { number: KeyNumber(1) }.to_string());
    let cause = error.chain().nth(1).map(ToString::to_string);
    assert_eq!(cause, fork, "the fork is called by its name");

    visit(&mut away).await.unwrap();
    assert_eq!(holds(&away), (1, Some(Version(1))), "it went after the thief");
    *world.forgery.lock().unwrap() = None;
    world.roll_back();
    visit(&mut away).await.unwrap_err();
    visit(&mut informed).await.unwrap();
    // What is left to do for it: to enrol anew.
    let anew = world.enrolled().await;
    drop(away);
    let mut away = world.device("away", &anew);
    visit(&mut away).await.unwrap();
    assert_eq!(holds(&away), (1, Some(Version(2))));
}

/// The private key in a state directory, as its thief reads it.
fn aggregator_key(directory: &Directory) -> SigningKey {
    directory.signer().unwrap().keys().signing().clone()
}

/// A state directory without a database, which is all that the keys need.
fn state(place: &Path) -> Directory {
    let directory = Directory::create(place, NOW_MS).unwrap();
    directory.write_config("").unwrap();
    directory
}

#[test]
fn a_kill_in_the_midst_of_a_rotation_leaves_keys_that_sign_and_that_devices_follow() {
    let place = tempfile::tempdir().unwrap();
    let directory = state(&place.path().join("state"));
    let device = directory.signer().unwrap().keys().lineage().clone();
    let verb = |verb: &str| {
        let mut command = command("aggregator");
        command.args(["keys", verb, "--json", "--dir"]).arg(directory.path());
        command
    };
    for (step, renamed) in [("drawn", 0), ("written", 0), ("renamed", 1)] {
        let before = directory.signer().unwrap().keys().lineage().number().0;
        let mut rotating =
            Running::start("rotate", verb("rotate").env(pause::VARIABLE, step), &place.path().join("log"));
        assert_eq!(rotating.event("paused")["at"], step);
        rotating.kill();
        let listed = Finished::of(&mut verb("list")).with_code(0).objects();
        let last = listed.last().unwrap();
        assert_eq!(
            (&last["number"], &last["in_force"]),
            (&(before + renamed).into(), &true.into()),
            "{step}"
        );
        assert_eq!(listed.iter().filter(|key| key["in_force"] == true).count(), 1);
        // It signs, and a device of the very first key can follow to it.
        let keys = directory.signer().unwrap().keys();
        assert_eq!(AggregatorKey::of(keys.signing()), keys.lineage().key());
        let mut followed = device.clone();
        followed.follow(keys.lineage().after(device.number())).unwrap();
        assert_eq!(followed.key(), keys.lineage().key(), "{step}");
        // Nor does it stand in the way of the next.
        let told = Finished::of(&mut verb("rotate")).with_code(0).objects();
        assert_eq!(told[0]["number"], before + renamed + 1, "{step}");
        assert_eq!(told[0]["retired"], last["key"], "{step}");
    }
    let lineage: Lineage = directory.signer().unwrap().keys().lineage().clone();
    assert_eq!(lineage.number(), KeyNumber(4));
}

/// The programs themselves, on the bundled model.
#[test]
fn a_running_server_signs_with_a_rotated_key_from_its_next_request_on() {
    let federation = Federation::new(2, |_| ());
    let aggregator = federation.serve_rounds(None, "");
    let device = federation.device("device");
    device.call(&["enroll", &federation.invitations(1)[0]]).with_code(0);
    let installed = |finished: &Finished| {
        let done = |event: &serde_json::Value| event["stage"] == "install";
        finished.objects().iter().find(|event| done(event)).map(|event| event["version"].clone())
    };
    assert_eq!(installed(&device.call(&["once"]).with_code(0)), Some(federation.first_version.into()));

    for _ in 0..2 {
        Finished::of(federation.verb("keys").arg("rotate")).with_code(0);
    }
    let version = federation.first_version + 1;
    let first = federation.first_version.to_string();
    Finished::of(federation.verb("rollback").arg(first)).with_code(0);
    let second = device.call(&["once"]).with_code(0);
    let followed = second.objects().into_iter().find(|event| event["event"] == "key_followed").unwrap();
    let listed = Finished::of(federation.verb("keys").args(["list", "--json"])).with_code(0).objects();
    assert_eq!((&followed["number"], &followed["key"]), (&listed[2]["number"], &listed[2]["key"]));
    assert_eq!(installed(&second), Some(version.into()));
    let shown = Finished::of(federation.verb("show").args([&version.to_string(), "--json"])).with_code(0);
    assert_eq!(shown.objects()[0]["signed_with"], 2);
    assert_eq!(aggregator.stop(), 0);

    // A device that is not to be trusted with what it followed begins anew, as another.
    let invitation = &federation.invitations(1)[0];
    let aggregator = federation.serve_rounds(None, "");
    let refused = device.call(&["enroll", invitation]).with_code(3);
    assert!(refused.stderr.contains("--anew"), "{}", refused.stderr);
    // Nor does it matter what is left of that.
    let chain = device.state().join("identity/succession.json");
    assert!(chain.exists());
    std::fs::write(chain, b"damaged").unwrap();
    let lost = device.call(&["once"]).with_code(1);
    assert!(lost.stderr.contains("succession.json is damaged"), "{}", lost.stderr);
    device.call(&["enroll", "--anew", invitation]).with_code(0);
    assert_eq!(installed(&device.call(&["once"]).with_code(0)), Some(version.into()));
    assert_eq!(aggregator.stop(), 0);
}

//! A device that runs for long renews its certificate while it runs: one that is soon due is put under it, signed with the
//! federation's own authority.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::fs;

use commonweal_protocol::Enrolled;
use commonweal_tests::federation::Federation;
use commonweal_transport::{Authority, Clock, Credentials};

/// A certificate begins so long before its issue (`docs/wire.md`).
const BACKDATED_MS: u64 = 5 * 60 * 1000;
/// From issue until it is due: enough to start the device before.
const DUE_MS: u64 = 10_000;

#[test]
fn a_running_device_renews_its_certificate_and_goes_on() {
    let federation = Federation::new(1, |_| ());
    let aggregator = federation.serve_rounds(None, "");
    let device = federation.device("device-0");
    device.call(&["enroll", &federation.invitations(1)[0]]).with_code(0);
    let path = device.state().join("identity/credentials.pem");
    let read = || Credentials::from_pem(&fs::read_to_string(&path).unwrap()).unwrap();

    // Two thirds of its life are over in `DUE_MS`.
    let life_ms = (BACKDATED_MS + DUE_MS) / 2 * 3 - BACKDATED_MS;
    let enrolled = read();
    let authority = fs::read_to_string(federation.state().join("authority.pem")).unwrap();
    let authority = Authority::from_pem(&authority).unwrap();
    let (key, now_ms) = (enrolled.key().clone(), Clock::system().unix_ms());
    let chain = authority.issue_device(&key.csr().unwrap(), enrolled.device(), now_ms, life_ms).unwrap();
    let answer = Enrolled { device: enrolled.device(), chain, signing_key: *enrolled.signing_key() };
    let short = Credentials::new(key, &answer, authority.digest()).unwrap();
    fs::write(&path, short.to_pem().as_bytes()).unwrap();

    let mut running = device.run();
    running.event("waiting");
    assert_eq!(read().to_pem(), short.to_pem(), "renewed before it was due");
    let fresh = loop {
        running.event("waiting");
        let now = read();
        if now.to_pem() != short.to_pem() {
            break now;
        }
        assert!(Clock::system().unix_ms() < now_ms + 6 * DUE_MS, "not renewed when it was due");
    };
    assert!(fresh.expires_ms() > short.expires_ms() && fresh.device() == short.device());
    // It is served under the fresh one, in a round for which it has no samples.
    let wait = running.event("waiting");
    assert!(wait["why"].as_str().unwrap().starts_with("nothing to train on"), "{wait}");
    assert_eq!(running.stop(), 0);
    assert_eq!(aggregator.stop(), 0);
}

//! A device whose certificate ends: renewed while it runs, enrolled anew if it did not run in time. Certificates that end
//! soon are signed with the federation's own authority and put in the place of the device's.
#![allow(clippy::unwrap_used, reason = "a test that cannot get its value has failed")]

use std::fs;

use commonweal_protocol::Enrolled;
use commonweal_tests::federation::{Device, Federation};
use commonweal_transport::{Authority, Clock, Credentials};

/// A certificate begins so long before its issue (`docs/wire.md`).
const BACKDATED_MS: u64 = 5 * 60 * 1000;
/// From issue until it is due: enough to start the device before.
const DUE_MS: u64 = 10_000;

fn credentials(device: &Device) -> Credentials {
    let text = fs::read_to_string(device.state().join("identity/credentials.pem")).unwrap();
    Credentials::from_pem(&text).unwrap()
}

/// An enrolled device, with a certificate that was issued at this time and for this long.
fn enrolled(federation: &Federation, issued_ms: u64, life_ms: u64) -> Device {
    let device = federation.device("device-0");
    device.call(&["enroll", &federation.invitations(1)[0]]).with_code(0);
    let given = credentials(&device);
    let authority = fs::read_to_string(federation.state().join("authority.pem")).unwrap();
    let authority = Authority::from_pem(&authority).unwrap();
    let key = given.key().clone();
    let chain = authority.issue_device(&key.csr().unwrap(), given.device(), issued_ms, life_ms).unwrap();
    let answer = Enrolled {
        device: given.device(),
        chain,
        signing_key: *given.signing_key(),
        key_number: given.lineage().number(),
    };
    let other = Credentials::new(key, &answer, authority.digest()).unwrap();
    fs::write(device.state().join("identity/credentials.pem"), other.to_pem().as_bytes()).unwrap();
    device
}

#[test]
fn a_running_device_renews_its_certificate_and_goes_on() {
    let federation = Federation::new(1, |_| ());
    let aggregator = federation.serve_rounds(None, "");
    // Two thirds of its life are over in `DUE_MS`.
    let issued_ms = Clock::system().unix_ms();
    let device = enrolled(&federation, issued_ms, (BACKDATED_MS + DUE_MS) * 3 / 2 - BACKDATED_MS);
    let short = credentials(&device);

    let mut running = device.run();
    running.event("waiting");
    assert_eq!(credentials(&device).to_pem(), short.to_pem(), "renewed before it was due");
    let fresh = loop {
        running.event("waiting");
        let now = credentials(&device);
        if now.to_pem() != short.to_pem() {
            break now;
        }
        assert!(Clock::system().unix_ms() < issued_ms + 6 * DUE_MS, "not renewed when it was due");
    };
    assert!(fresh.expires_ms() > short.expires_ms() && fresh.device() == short.device());
    // It is served under the fresh one, in a round for which it has no samples.
    let wait = running.event("waiting");
    assert!(wait["why"].as_str().unwrap().starts_with("nothing to train on"), "{wait}");
    assert_eq!(running.stop(), 0);
    assert_eq!(aggregator.stop(), 0);
}

#[test]
fn a_device_whose_certificate_has_ended_says_so_and_can_enrol_anew() {
    let federation = Federation::new(1, |_| ());
    let _aggregator = federation.serve_rounds(None, "");
    let hour_ms = 3_600_000;
    let device = enrolled(&federation, Clock::system().unix_ms() - 2 * hour_ms, hour_ms);
    let before = credentials(&device).device();
    let refused = device.call(&["run"]).with_code(4);
    assert!(refused.stderr.contains("certificate expired"), "{}", refused.stderr);
    let invitations = federation.invitations(2);
    device.call(&["enroll", &invitations[0]]).with_code(0);
    assert_ne!(credentials(&device).device(), before);
    device.call(&["once"]).with_code(0);
    // While a certificate holds, its identity is not thrown away.
    device.call(&["enroll", &invitations[1]]).with_code(3);
}

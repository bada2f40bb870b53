//! Cases of the suite: who is let in. Neighbours: `world` sets the scene.

use super::world::{Medium, Raw, Subject, World};
use crate::{Authority, Credentials, DeviceKey, Link as _, LinkError, Wire};
use commonweal_protocol::{
    CertificateChain, Chunk, Csr, DeviceId, Enrolled, KeyNumber, Opaque, Refusal, Request, Token,
};

/// A token and a signing request become a certificate, with which the device is served.
pub async fn enrolling_yields_an_identity_that_is_served<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let (one, two) = (world.enrol().await, world.enrol().await);
    assert_ne!(one.device(), two.device());
    assert_eq!(*one.signing_key(), world.subject.signing_key());
    assert_eq!(one.authority_digest(), world.authority.digest());
    assert!(one.expires_ms() > world.clock.unix_ms());
    for credentials in [one, two] {
        let kept = Credentials::from_pem(&credentials.to_pem()).unwrap();
        assert_eq!(kept.lineage(), credentials.lineage());
        world.link(&kept).poll(world.poll()).await.unwrap();
    }
}

/// A token that yielded a certificate never does again.
pub async fn a_token_enrols_one_device<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let token = world.subject.invite();
    let stranger = world.stranger(world.authority.digest());
    stranger.enroll(token, DeviceKey::generate().unwrap().csr().unwrap()).await.unwrap();
    let again = world.stranger(world.authority.digest());
    let error = again.enroll(token, DeviceKey::generate().unwrap().csr().unwrap()).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::TokenRefused), "{error:?}");
}

/// A token that nobody gave out is worth nothing.
pub async fn an_unknown_token_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    world.subject.invite();
    let stranger = world.stranger(world.authority.digest());
    let csr = DeviceKey::generate().unwrap().csr().unwrap();
    let error = stranger.enroll(Token([9; 32]), csr).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::TokenRefused), "{error:?}");
}

/// A signing request that is none, or that was not signed by its key, is refused.
pub async fn a_malformed_signing_request_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let mut forged = DeviceKey::generate().unwrap().csr().unwrap().into_bytes();
    *forged.last_mut().unwrap() ^= 1;
    for csr in [vec![], vec![0x30; 100], forged] {
        let stranger = world.stranger(world.authority.digest());
        let error = stranger.enroll(world.subject.invite(), Csr::new(csr).unwrap()).await.unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::CsrRefused), "{error:?}");
    }
}

/// A device whose invitation names another authority does not speak to this one, and its token stays good.
pub async fn a_wrong_authority_pin_is_refused_and_spends_no_token<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let (token, csr) = (world.subject.invite(), DeviceKey::generate().unwrap().csr().unwrap());
    let other = Authority::create(world.clock.unix_ms()).unwrap();
    let error = world.stranger(other.digest()).enroll(token, csr.clone()).await.unwrap_err();
    assert!(matches!(error, LinkError::Untrusted { .. }), "{error:?}");
    world.stranger(world.authority.digest()).enroll(token, csr).await.unwrap();
}

/// A certificate from elsewhere is refused, also when the device trusts this aggregator.
pub async fn a_device_of_another_authority_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let genuine = world.enrol().await;
    let key = DeviceKey::generate().unwrap();
    let now_ms = world.clock.unix_ms();
    let other = Authority::create(now_ms).unwrap();
    let theirs = other.issue_device(&key.csr().unwrap(), genuine.device(), now_ms, 3_600_000).unwrap();
    let ours = Opaque::new(genuine.authority().to_vec()).unwrap();
    let enrolled = Enrolled {
        device: genuine.device(),
        chain: CertificateChain(vec![theirs.0[0].clone(), ours]),
        signing_key: world.subject.signing_key(),
        key_number: KeyNumber(0),
    };
    let forged = Credentials::new(key, &enrolled, world.authority.digest()).unwrap();
    let error = world.link(&forged).poll(world.poll()).await.unwrap_err();
    assert!(matches!(error, LinkError::CertificateRefused { .. }), "{error:?}");
}

/// A device of another federation does not speak to this aggregator.
pub async fn an_aggregator_of_another_authority_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let key = DeviceKey::generate().unwrap();
    let now_ms = world.clock.unix_ms();
    let other = Authority::create(now_ms).unwrap();
    let device = DeviceId([7; 16]);
    let chain = other.issue_device(&key.csr().unwrap(), device, now_ms, 3_600_000).unwrap();
    let enrolled =
        Enrolled { device, chain, signing_key: world.subject.signing_key(), key_number: KeyNumber(0) };
    let elsewhere = Credentials::new(key, &enrolled, other.digest()).unwrap();
    let error = world.link(&elsewhere).poll(world.poll()).await.unwrap_err();
    assert!(matches!(error, LinkError::Untrusted { .. }), "{error:?}");
}

/// A certificate past its time opens no connection, and is not served on one that was opened before.
pub async fn an_expired_certificate_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let before = world.link(&credentials);
    before.poll(world.poll()).await.unwrap();
    assert!(world.clock.set(credentials.expires_ms() + 60_000));
    let error = world.link(&credentials).poll(world.poll()).await.unwrap_err();
    assert!(matches!(error, LinkError::CertificateRefused { .. }), "{error:?}");
    let error = before.poll(world.poll()).await.unwrap_err();
    let expired = error.refusal() == Some(Refusal::Expired);
    assert!(expired || matches!(error, LinkError::CertificateRefused { .. }), "{error:?}");
}

/// A fresh certificate is for the same device, and is served.
pub async fn renewing_keeps_the_device<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let old = world.enrol().await;
    assert!(!old.should_renew(world.clock.unix_ms()));
    let life_ms = old.expires_ms() - world.clock.unix_ms();
    assert!(world.clock.set(old.expires_ms() - life_ms / 4));
    assert!(old.should_renew(world.clock.unix_ms()));
    let key = DeviceKey::generate().unwrap();
    let chain = world.link(&old).renew(key.csr().unwrap()).await.unwrap();
    let fresh = old.renewed(key, &chain).unwrap();
    assert_eq!(fresh.device(), old.device());
    assert!(fresh.expires_ms() > old.expires_ms());
    assert!(world.clock.set(old.expires_ms() + 60_000));
    world.link(&fresh).poll(world.poll()).await.unwrap();
}

/// Revoking takes effect at the next request, on connections that are open as on new ones.
pub async fn a_revoked_device_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let (revoked, other) = (world.enrol().await, world.enrol().await);
    let before = world.link(&revoked);
    before.poll(world.poll()).await.unwrap();
    world.subject.revoke(revoked.device());
    for link in [before, world.link(&revoked)] {
        let error = link.poll(world.poll()).await.unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::Revoked), "{error:?}");
    }
    let key = DeviceKey::generate().unwrap();
    let error = world.link(&revoked).renew(key.csr().unwrap()).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::Revoked), "{error:?}");
    world.link(&other).poll(world.poll()).await.unwrap();
}

/// Whose certificate ends between an upload's opening and its end is not signed for.
pub async fn a_certificate_that_ends_during_an_upload_gets_no_receipt<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let (open, payload) = world.subject.update();
    let (mut raw, _) = Raw::open_upload(&world.link(&credentials), open).await;
    assert!(world.clock.set(credentials.expires_ms() + 1));
    send_all(&mut raw, &payload).await;
    assert_eq!(raw.refusal().await, Refusal::Expired);
}

/// Whoever is revoked between an upload's opening and its end is not signed for.
pub async fn a_device_revoked_while_it_uploads_gets_no_receipt<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let (open, payload) = world.subject.update();
    let (mut raw, _) = Raw::open_upload(&world.link(&credentials), open).await;
    world.subject.revoke(credentials.device());
    send_all(&mut raw, &payload).await;
    assert_eq!(raw.refusal().await, Refusal::Revoked);
}

async fn send_all<W: Wire>(raw: &mut Raw<W>, payload: &[u8]) {
    for (index, bytes) in payload.chunks(1 << 20).enumerate() {
        let chunk = Chunk::new((index as u64) << 20, bytes.to_vec()).unwrap();
        raw.send(&Request::Chunk(chunk)).await;
    }
    raw.send(&Request::Finish).await;
}

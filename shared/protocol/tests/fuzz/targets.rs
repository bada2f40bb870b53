//! What must hold for any bytes at all. Run by `../fuzz.rs` and by the targets in `fuzz/`.

use commonweal_protocol::{
    AggregatorKey, EnrolmentReply, EnrolmentRequest, Invitation, KeyNumber, Lineage, Message, Reply, Request,
    SignedRelease, SignedSuccession, SigningKey, decode, encode,
};
use std::sync::LazyLock;

/// The key that the seeds are signed with.
pub(crate) fn key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

/// A frame's body is refused with an error that can be shown, or is a message that is encoded and decoded again.
pub(crate) fn frame(body: &[u8]) {
    one::<Request>(body);
    one::<Reply>(body);
    one::<EnrolmentRequest>(body);
    one::<EnrolmentReply>(body);
}

fn one<M: Message + PartialEq + std::fmt::Debug>(body: &[u8]) {
    match decode::<M>(body) {
        Ok(message) => {
            let frame = encode(&message).expect("what was decoded is in its bounds");
            assert!(frame.len() <= 4 + body.len(), "an encoding is the shortest");
            assert_eq!(decode::<M>(&frame[4..]).expect("it is decoded again"), message);
        }
        Err(error) => assert!(error.to_string().len() < 300, "{error}"),
    }
}

/// A signed release is refused, or it is one that the key signed: none but the seeds.
pub(crate) fn release(bytes: &[u8]) {
    if let Ok((signed, _)) = postcard::take_from_bytes::<SignedRelease>(bytes)
        && let Ok(release) = signed.verify(&AggregatorKey::of(&key()))
    {
        assert_eq!(release.created_ms, 1_767_225_600_000, "nothing else was ever signed");
    }
}

/// Three rotations, which the seeds are made of.
pub(crate) static LINEAGE: LazyLock<Lineage> = LazyLock::new(|| {
    let key = |number| SigningKey::from_bytes(&[number; 32]);
    let mut lineage = Lineage::new(KeyNumber(0), AggregatorKey::of(&key(0)));
    for number in 0..3 {
        let next = AggregatorKey::of(&key(number + 1));
        lineage.succeed(&key(number), next, 1_767_225_600_000).expect("a fresh key follows");
    }
    lineage
});

/// Steps are not followed, none of them, or they are the ones that the keys of the seeds signed for.
pub(crate) fn succession(bytes: &[u8]) {
    let Ok((steps, _)) = postcard::take_from_bytes::<Vec<SignedSuccession>>(bytes) else { return };
    let mut device = Lineage::new(KeyNumber(0), LINEAGE.first());
    match device.follow(&steps) {
        Ok(()) => assert!(LINEAGE.steps().starts_with(device.steps()), "nothing else was ever signed"),
        Err(error) => {
            assert_eq!(device.number(), KeyNumber(0), "all or none");
            assert!(error.to_string().len() < 300, "{error}");
        }
    }
}

/// A text is refused with an error that can be shown, or is an invitation that is written and read again.
pub(crate) fn invitation(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match text.parse::<Invitation>() {
        Ok(invitation) => assert_eq!(invitation.to_string().parse(), Ok(invitation)),
        Err(error) => assert!(error.to_string().len() < 300, "{error}"),
    }
}

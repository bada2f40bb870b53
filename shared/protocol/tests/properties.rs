//! For any message, and for any bytes: what is encoded is decoded, what is no message is refused, nothing panics.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fuzz {
    pub(super) mod targets;
}
mod samples;

use commonweal_protocol::{
    AggregatorKey, BaseHash, Chunk, Content, DeviceReport, Digest, Fault, Fetch, Header, KeyNumber, Lineage,
    Opaque, Open, Poll, ReconnectWindow, Refusal, Refused, Reply, Request, RoundId, SigningKey, TraceContext,
    Trouble, Version, bounds, decode, encode,
};
use proptest::prelude::*;

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn chunk() -> impl Strategy<Value = Chunk> {
    let parts = (0..bounds::CONTENT_BYTES_MAX - 5000, digest(), prop::collection::vec(any::<u8>(), 1..5000));
    parts.prop_map(|(offset, hash, bytes)| Chunk { offset, hash, bytes: Opaque::new(bytes).unwrap() })
}

fn report() -> impl Strategy<Value = DeviceReport> {
    let counts = (0..1000u32, 0..1000u32, 0..1000u32, 0..1000u32, any::<u32>());
    let rest = (0..=bounds::STEPS_MAX, any::<u64>(), -1e6f32..1e6, 0f32..1e12);
    (counts, rest).prop_map(|((kept, dropped, refused, revised, revision_attempts), rest)| DeviceReport {
        sampled: kept + dropped + refused + revised,
        kept,
        dropped,
        refused,
        revised,
        revision_attempts,
        steps: rest.0,
        trained_tokens: rest.1,
        loss_first: rest.2,
        loss_last: -rest.2,
        delta_norm: rest.3,
    })
}

fn open() -> impl Strategy<Value = Open> {
    let trace = prop::option::of((any::<[u8; 16]>(), any::<[u8; 8]>())).prop_map(|place| {
        place.map(|(mut trace, mut span)| {
            (trace[0], span[7]) = (trace[0] | 1, span[7] | 1);
            TraceContext { trace, span }
        })
    });
    let parts =
        (any::<u64>(), any::<[u8; 32]>(), digest(), 1..=bounds::UPDATE_BYTES_MAX, 1u32.., report(), trace);
    parts.prop_map(|(round, base, digest, length, samples, report, trace)| Open {
        round: RoundId(round),
        base: BaseHash(base),
        digest,
        length,
        samples,
        report,
        trace,
    })
}

fn request() -> impl Strategy<Value = Request> {
    let faults = [Fault::Signature, Fault::Base, Fault::Damaged, Fault::Layout, Fault::Missing, Fault::Room];
    let trouble = prop::option::of((any::<u64>(), prop::sample::select(faults.to_vec())));
    let parts = (any::<[u8; 32]>(), any::<Option<u64>>(), any::<u64>(), trouble);
    let poll = parts.prop_map(|(base, installed, key, trouble)| {
        let (installed, key) = (installed.map(Version), KeyNumber(key));
        let trouble = trouble.map(|(version, fault)| Trouble { version: Version(version), fault });
        Request::Poll(Poll { base: BaseHash(base), installed, key, trouble })
    });
    let fetch = (digest(), 0..=bounds::CONTENT_BYTES_MAX)
        .prop_map(|(digest, offset)| Request::Fetch(Fetch { digest, offset }));
    prop_oneof![
        poll,
        fetch,
        open().prop_map(Request::Open),
        chunk().prop_map(Request::Chunk),
        Just(Request::Finish)
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    let refused =
        (0..=bounds::RECONNECT_MS_MAX, 0..=bounds::RECONNECT_MS_MAX).prop_map(|(after_ms, spread_ms)| {
            let reconnect = ReconnectWindow { after_ms, spread_ms };
            Reply::Refused(Refused { reason: Refusal::NotInRound, reconnect })
        });
    let content = (digest(), 1..=bounds::CONTENT_BYTES_MAX)
        .prop_map(|(digest, length)| Reply::Content(Content { digest, length }));
    prop_oneof![
        refused,
        content,
        (0..=bounds::UPDATE_BYTES_MAX).prop_map(Reply::Offset),
        chunk().prop_map(Reply::Chunk)
    ]
}

/// Key 0 and five rotations; then what the thief of key 2 makes of it: another key 3, 4 and 5.
fn chain_and_fork() -> (Lineage, Lineage) {
    let key = |number: u64| SigningKey::from_bytes(&[number as u8; 32]);
    let public = |number| AggregatorKey::of(&key(number));
    let mut chain = Lineage::new(KeyNumber(0), public(0));
    let mut fork = chain.clone();
    for number in 0..5 {
        chain.succeed(&key(number), public(number + 1), number).unwrap();
        let thief = if number > 2 { 100 } else { 0 };
        let next = if number < 2 { 0 } else { 100 };
        fork.succeed(&key(thief + number), public(next + number + 1), number).unwrap();
    }
    (chain, fork)
}

proptest! {
    /// Of all that can be put together of a chain and of a thief's, a device follows only what goes on from its own key.
    #[test]
    fn only_what_goes_on_is_followed(
        known in 3..=5usize,
        length in 0..=3usize,
        changes in prop::collection::vec((0..3usize, 0..10usize), 0..2),
    ) {
        let (chain, fork) = chain_and_fork();
        let all = [chain.steps(), fork.steps()].concat();
        let mut picked: Vec<usize> = (known..known + length).filter(|step| *step < 5).collect();
        for (place, step) in changes {
            if place < picked.len() { picked[place] = step } else { picked.push(step) }
        }
        let goes_on = picked.iter().enumerate().all(|(place, step)| *step == known + place && *step < 5);
        let steps: Vec<_> = picked.iter().map(|step| all[*step]).collect();
        let mut device = Lineage::new(KeyNumber(0), chain.first());
        device.follow(&chain.steps()[..known]).unwrap();
        prop_assert_eq!(device.follow(&steps).is_ok(), goes_on, "{:?} after {}", picked, known);
        let followed = known + if goes_on { picked.len() } else { 0 };
        prop_assert_eq!(device.steps(), &chain.steps()[..followed]);
    }

    #[test]
    fn requests_come_back(request in request()) {
        let frame = encode(&request).unwrap();
        let header: [u8; 4] = frame[..4].try_into().unwrap();
        let header = Header::parse(header, bounds::FRAME_BYTES_MAX).unwrap();
        prop_assert_eq!(header.body_bytes(), frame.len() - 4);
        prop_assert_eq!(decode::<Request>(&frame[4..]).unwrap(), request);
    }

    #[test]
    fn replies_come_back(reply in reply()) {
        let frame = encode(&reply).unwrap();
        prop_assert_eq!(decode::<Reply>(&frame[4..]).unwrap(), reply);
    }

    /// A frame that ends early is none: no message is another one's beginning.
    #[test]
    fn a_part_of_a_frame_is_no_frame(request in request(), cut in any::<prop::sample::Index>()) {
        let frame = encode(&request).unwrap();
        let end = cut.index(frame.len() - 4);
        prop_assert!(decode::<Request>(&frame[4..4 + end]).is_err());
    }

    #[test]
    fn any_bytes_are_refused_or_a_message(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz::targets::frame(&bytes);
        fuzz::targets::release(&bytes);
        fuzz::targets::succession(&bytes);
    }

    #[test]
    fn any_text_is_refused_or_an_invitation(text in "commonweal://[a-z:\\[\\]0-9.]{0,20}/\\?(token|ca|x)?=?[0-9a-f]{0,70}&?.{0,20}") {
        fuzz::targets::invitation(text.as_bytes());
    }
}

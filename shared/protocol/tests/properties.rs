//! For any message, and for any bytes: what is encoded is decoded, what is no message is refused, nothing panics.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fuzz {
    pub(super) mod targets;
}
mod samples;

use commonweal_protocol::{
    BaseHash, Chunk, Content, DeviceReport, Digest, Fetch, Header, Opaque, Open, Poll, ReconnectWindow,
    Refusal, Refused, Reply, Request, RoundId, Version, bounds, decode, encode,
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
    let parts = (any::<u64>(), any::<[u8; 32]>(), digest(), 1..=bounds::UPDATE_BYTES_MAX, 1u32.., report());
    parts.prop_map(|(round, base, digest, length, samples, report)| Open {
        round: RoundId(round),
        base: BaseHash(base),
        digest,
        length,
        samples,
        report,
    })
}

fn request() -> impl Strategy<Value = Request> {
    let poll = (any::<[u8; 32]>(), any::<Option<u64>>()).prop_map(|(base, installed)| {
        Request::Poll(Poll { base: BaseHash(base), installed: installed.map(Version) })
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

proptest! {
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
    }

    #[test]
    fn any_text_is_refused_or_an_invitation(text in "commonweal://[a-z:\\[\\]0-9.]{0,20}/\\?(token|ca|x)?=?[0-9a-f]{0,70}&?.{0,20}") {
        fuzz::targets::invitation(text.as_bytes());
    }
}

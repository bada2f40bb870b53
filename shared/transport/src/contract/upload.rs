//! Cases of the suite: updates arrive whole, once, and are signed for. Neighbours: `world` sets the scene.

use super::world::{Medium, PATIENCE, Raw, Subject, World};
use crate::{Link as _, LinkError};
use commonweal_protocol::{Chunk, Digest, Refusal, Reply, Request};
use std::time::Duration;

fn chunk(offset: usize, bytes: &[u8]) -> Request {
    Request::Chunk(Chunk::new(offset as u64, bytes.to_vec()).unwrap())
}

/// The receipt names what was sent and who sent it, and the aggregator's key signed it.
pub async fn an_update_is_received_and_signed_for<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let (open, payload) = world.subject.update();
    let uploaded = world.link(&credentials).upload(&open, &payload).await.unwrap();
    let receipt = uploaded.receipt.verify(credentials.signing_key()).unwrap();
    assert_eq!(receipt.device, credentials.device());
    assert_eq!((receipt.round, receipt.digest), (open.round, open.digest));
    assert_eq!(receipt.length, payload.len() as u64);
    assert_eq!((uploaded.resumed_from, uploaded.sent_bytes), (0, payload.len() as u64));
}

/// Bytes that the handler has are not sent again.
pub async fn a_cut_upload_goes_on_where_it_was<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let link = world.link(&credentials);
    let (open, payload) = world.subject.update();
    let (first, second) = (payload.len() / 4, payload.len() / 2);
    let (mut raw, offset) = Raw::open_upload(&link, open).await;
    assert_eq!(offset, 0);
    raw.send(&chunk(0, &payload[..first])).await;
    raw.send(&chunk(first, &payload[first..second])).await;
    let arrived = async {
        while Raw::open_upload(&link, open).await.1 < second as u64 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, arrived).await.unwrap();
    drop(raw);
    let uploaded = world.link(&credentials).upload(&open, &payload).await.unwrap();
    uploaded.receipt.verify(credentials.signing_key()).unwrap();
    assert_eq!(uploaded.resumed_from, second as u64);
    assert_eq!(uploaded.sent_bytes, (payload.len() - second) as u64);
}

/// Delivering is idempotent by (round, device, digest).
pub async fn the_same_update_again_gets_the_same_receipt<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let (open, payload) = world.subject.update();
    let link = world.link(&credentials);
    let once = link.upload(&open, &payload).await.unwrap();
    assert!(world.clock.set(world.clock.unix_ms() + 1000));
    for link in [link, world.link(&credentials)] {
        let again = link.upload(&open, &payload).await.unwrap();
        assert_eq!(again.receipt, once.receipt);
        assert_eq!((again.resumed_from, again.sent_bytes), (open.length, 0));
    }
}

/// Two of them at once hinder each other and both come through.
pub async fn two_uploads_of_one_update_at_once_get_one_receipt<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let (open, payload) = world.subject.update();
    let (one, two) = (world.link(&credentials), world.link(&credentials));
    let (one, two) = tokio::join!(one.upload(&open, &payload), two.upload(&open, &payload));
    assert_eq!(one.unwrap().receipt, two.unwrap().receipt);
}

/// A round that is over takes nothing more.
pub async fn a_stale_round_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let (mut open, payload) = world.subject.update();
    open.round = world.subject.stale_round();
    let error = world.link(&credentials).upload(&open, &payload).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::StaleRound), "{error:?}");
    assert!(!error.is_transient());
}

/// Neither too few bytes, nor too many, nor other bytes get a receipt; and nothing of them is left.
pub async fn an_update_that_is_not_as_announced_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let link = world.link(&credentials);
    let (open, payload) = world.subject.update();
    let end = payload.len().min(1 << 20);

    let (mut raw, _) = Raw::open_upload(&link, open).await;
    raw.send(&Request::Finish).await;
    assert_eq!(raw.refusal().await, Refusal::LengthMismatch);

    let mut short = open;
    short.length = end as u64 - 1;
    let (mut raw, _) = Raw::open_upload(&link, short).await;
    raw.send(&chunk(0, &payload[..end])).await;
    assert_eq!(raw.refusal().await, Refusal::LengthMismatch);

    let mut other = open;
    other.digest = Digest([3; 32]);
    for _ in 0..2 {
        let (mut raw, offset) = Raw::open_upload(&link, other).await;
        assert_eq!(offset, 0);
        for (index, bytes) in payload.chunks(1 << 20).enumerate() {
            raw.send(&chunk(index << 20, bytes)).await;
        }
        raw.send(&Request::Finish).await;
        assert_eq!(raw.refusal().await, Refusal::DigestMismatch);
    }
    link.upload(&open, &payload).await.unwrap();
}

/// A device does not announce one thing and send another by mistake.
pub async fn a_payload_other_than_its_announcement_is_not_sent<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let (open, mut payload) = world.subject.update();
    payload[0] ^= 1;
    let error = world.link(&credentials).upload(&open, &payload).await.unwrap_err();
    assert!(matches!(error, LinkError::PayloadMismatch { .. }), "{error:?}");
}

/// A chunk goes where the bytes held end, and is what its hash says.
pub async fn chunks_that_do_not_fit_are_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let credentials = world.enrol().await;
    let link = world.link(&credentials);
    let (open, payload) = world.subject.update();

    let (mut raw, _) = Raw::open_upload(&link, open).await;
    raw.send(&chunk(1, &payload[1..9])).await;
    assert_eq!(raw.refusal().await, Refusal::OffsetMismatch);

    let (mut raw, _) = Raw::open_upload(&link, open).await;
    raw.send(&chunk(0, &payload[..8])).await;
    raw.send(&chunk(0, &payload[..8])).await;
    assert_eq!(raw.refusal().await, Refusal::OffsetMismatch);

    let (mut raw, offset) = Raw::open_upload(&link, open).await;
    assert_eq!(offset, 8);
    let mut corrupt = Chunk::new(8, payload[8..16].to_vec()).unwrap();
    corrupt.hash = Digest([0; 32]);
    raw.send(&Request::Chunk(corrupt)).await;
    assert_eq!(raw.refusal().await, Refusal::ChunkCorrupt);

    // Another stream took the place: the handler itself must see that this chunk no longer fits.
    let (mut slow, offset) = Raw::open_upload(&link, open).await;
    assert_eq!(offset, 8);
    let (mut fast, _) = Raw::open_upload(&link, open).await;
    fast.send(&chunk(8, &payload[8..16])).await;
    let arrived = async {
        while Raw::open_upload(&link, open).await.1 < 16 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, arrived).await.unwrap();
    slow.send(&chunk(8, &payload[8..16])).await;
    assert_eq!(slow.refusal().await, Refusal::OffsetMismatch);

    drop(fast);
    let mut raw = Raw::open(&link).await;
    raw.send(&Request::Open(open)).await;
    assert_eq!(raw.reply().await, Reply::Offset(16));
}

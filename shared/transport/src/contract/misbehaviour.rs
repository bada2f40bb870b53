//! Cases of the suite: peers that do not speak the protocol harm nobody else. Neighbours: `world` sets the scene.

use super::world::{Medium, PATIENCE, Raw, Subject, World};
use crate::{Link as _, ServeLimits};
use commonweal_protocol::{Chunk, FRAME_VERSION, Refusal, Request, bounds, encode};
use tokio::io::AsyncReadExt as _;

/// A length beyond the bound is refused before a byte of the body is there.
pub async fn an_oversized_frame_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let link = world.link(&world.enrol().await);
    for announced in [u32::MAX, bounds::CONTROL_BYTES_MAX as u32 + 1] {
        let mut raw = Raw::open(&link).await;
        raw.send_bytes(&announced.to_le_bytes()).await;
        assert_eq!(raw.refusal().await, Refusal::TooLarge);
    }
    let (open, _) = world.subject.update();
    let (mut raw, _) = Raw::open_upload(&link, open).await;
    raw.send_bytes(&(bounds::FRAME_BYTES_MAX as u32 + 1).to_le_bytes()).await;
    assert_eq!(raw.refusal().await, Refusal::TooLarge);
    link.poll(world.poll()).await.unwrap();
}

/// What is no message is refused, and the device is served on.
pub async fn garbage_is_refused_and_others_are_served<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let link = world.link(&world.enrol().await);
    let mut trailing = encode(&Request::Poll(world.poll())).unwrap();
    trailing.push(0);
    trailing[0] += 1;
    let frames: [(&[u8], Refusal); 5] = [
        (&[0, 0, 0, 0], Refusal::Malformed),
        (&[3, 0, 0, 0, FRAME_VERSION, 0xff, 0xff], Refusal::Malformed),
        (&[1, 0, 0, 0, FRAME_VERSION], Refusal::Malformed),
        (&[2, 0, 0, 0, FRAME_VERSION + 1, 0], Refusal::UnsupportedVersion),
        (&trailing, Refusal::Malformed),
    ];
    for (frame, expected) in frames {
        let mut raw = Raw::open(&link).await;
        raw.send_bytes(frame).await;
        assert_eq!(raw.refusal().await, expected, "{frame:?}");
        link.poll(world.poll()).await.unwrap();
    }
}

/// Messages that belong elsewhere are refused: a chunk or an end without an upload, a question within one.
pub async fn messages_out_of_place_are_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let link = world.link(&world.enrol().await);
    for request in [Request::Finish, Request::Chunk(Chunk::new(0, vec![1]).unwrap())] {
        let mut raw = Raw::open(&link).await;
        raw.send(&request).await;
        assert_eq!(raw.refusal().await, Refusal::Malformed);
    }
    let (open, _) = world.subject.update();
    let (mut raw, _) = Raw::open_upload(&link, open).await;
    raw.send(&Request::Poll(world.poll())).await;
    assert_eq!(raw.refusal().await, Refusal::Malformed);
    link.poll(world.poll()).await.unwrap();
}

/// A stream on which nothing moves is given up, before a request and within an upload; its slot is free again.
pub async fn a_peer_that_stands_still_is_dropped<S: Subject, M: Medium<S::Handler>>() {
    let limits = ServeLimits { stall_ms: 1500, transfers_max: 1, ..ServeLimits::default() };
    let world = World::<S, M>::start_with(limits);
    let link = world.link(&world.enrol().await);
    let (open, payload) = world.subject.update();

    let mut raw = Raw::open(&link).await;
    raw.send_bytes(&[7, 0]).await;
    // The end or an error of the stream: either way it is over, and no answer came.
    let read = tokio::time::timeout(PATIENCE, raw.0.receiving.read_u8()).await.unwrap();
    assert!(read.is_err());

    let (mut raw, _) = Raw::open_upload(&link, open).await;
    raw.send(&Request::Chunk(Chunk::new(0, payload[..8].to_vec()).unwrap())).await;
    raw.send_bytes(&[7]).await;
    let read = tokio::time::timeout(PATIENCE, raw.0.receiving.read_u8()).await.unwrap();
    assert!(read.is_err());

    let uploaded = world.link(&world.enrol().await).upload(&open, &payload).await.unwrap();
    assert_eq!(uploaded.sent_bytes, payload.len() as u64);
}

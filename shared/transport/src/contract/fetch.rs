//! Cases of the suite: what is published comes down whole. Neighbours: `world` sets the scene.

use super::world::{Medium, Raw, Subject, World};
use crate::Link as _;
use commonweal_protocol::{Content, Digest, Fetch, Refusal, Reply, Request};

fn content(bytes: &[u8]) -> Content {
    Content { digest: Digest::of(bytes), length: bytes.len() as u64 }
}

/// The bytes that come are those that were published.
pub async fn published_content_is_fetched<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let published = world.subject.published();
    let mut partial = Vec::new();
    let link = world.link(&world.enrol().await);
    link.fetch(content(&published), &mut partial).await.unwrap();
    assert!(partial == published);
    // Nothing is left to fetch, and that is fine.
    link.fetch(content(&published), &mut partial).await.unwrap();
    assert!(partial == published);
}

/// Bytes that the device has are not sent again.
pub async fn a_partial_download_goes_on_where_it_was<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let published = world.subject.published();
    let half = published.len() / 2;
    let link = world.link(&world.enrol().await);
    let mut raw = Raw::open(&link).await;
    let fetch = Fetch { digest: Digest::of(&published), offset: half as u64 };
    raw.send(&Request::Fetch(fetch)).await;
    assert_eq!(raw.reply().await, Reply::Content(content(&published)));
    let Reply::Chunk(chunk) = raw.reply().await else { panic!("expected a chunk") };
    assert_eq!(chunk.offset, half as u64);
    assert!(published[half..].starts_with(&chunk.bytes));
    let mut partial = published[..half].to_vec();
    link.fetch(content(&published), &mut partial).await.unwrap();
    assert!(partial == published);
}

/// A device that holds other bytes than it should ends with the right ones all the same.
pub async fn a_damaged_partial_download_is_fetched_anew<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let published = world.subject.published();
    let link = world.link(&world.enrol().await);
    let mut damaged = published[..published.len() / 2].to_vec();
    damaged[0] ^= 1;
    let mut too_long = published.clone();
    too_long.push(0);
    for mut partial in [damaged, too_long] {
        link.fetch(content(&published), &mut partial).await.unwrap();
        assert!(partial == published);
    }
}

/// Neither what nobody published nor what lies beyond the end.
pub async fn unknown_content_is_refused<S: Subject, M: Medium<S::Handler>>() {
    let world = World::<S, M>::start();
    let published = world.subject.published();
    let link = world.link(&world.enrol().await);
    let unknown = Content { digest: Digest([1; 32]), length: 10 };
    let error = link.fetch(unknown, &mut Vec::new()).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::ContentUnknown), "{error:?}");
    let mut raw = Raw::open(&link).await;
    let beyond = Fetch { digest: Digest::of(&published), offset: published.len() as u64 + 1 };
    raw.send(&Request::Fetch(beyond)).await;
    assert_eq!(raw.refusal().await, Refusal::ContentUnknown);
}

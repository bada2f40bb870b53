//! A device that takes part as it should, and says all that it said again, word for word and over fresh connections: of past
//! rounds and of the current one, while it delivers that for the first time too.

use std::sync::Arc;

use anyhow::Result;
use commonweal_protocol::Reply;
use commonweal_transport::Link as _;
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;

use super::{
    Kind, Site,
    member::Member,
    raw::{End, try_frames},
};

/// Between two visits, and between two repetitions.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 20..=80;

/// Delivers an update in each round that it has a task in.
pub(super) async fn deliver(site: Arc<Site>, member: Arc<Member>, mut random: ChaCha8Rng) -> Result<()> {
    while !site.is_over() {
        if let Some(task) = member.task(&mut random).await?.filter(|task| !member.has_receipt(task.round)) {
            let delivery = member.make(&task)?;
            // What fails while the aggregator is dead is begun again, as long as there is the task.
            if let Ok(uploaded) =
                member.link(&mut random)?.upload(&delivery.open, delivery.packed.bytes()).await
            {
                member.note(uploaded.receipt)?;
            }
        }
        site.pause(&mut random, PAUSE_MS).await;
    }
    Ok(())
}

/// Says the frames of one of its updates again, all of them or a part.
pub(super) async fn repeat(site: Arc<Site>, member: Arc<Member>, mut random: ChaCha8Rng) -> Result<()> {
    while !site.is_over() {
        if let Some(delivery) = member.recall(&mut random) {
            let frames = part(delivery.frames()?, &mut random);
            let link = member.link(&mut random)?;
            let end = site
                .count(Kind::Replays, async { Ok(try_frames::<Reply>(link.wire(), frames).await) })
                .await?;
            if let End::Receipt(receipt) = end {
                member.note(*receipt)?;
            }
        }
        site.pause(&mut random, PAUSE_MS).await;
    }
    Ok(())
}

/// What is said of an opening, chunks and an end.
fn part(mut frames: Vec<Vec<u8>>, random: &mut ChaCha8Rng) -> Vec<Vec<u8>> {
    let last = frames.len() - 1;
    match random.random_range(0..6) {
        // The same opening, chunk or end once more in its place.
        0 => {
            let index = random.random_range(0..=last);
            frames.insert(index, frames[index].clone());
        }
        // Chunks and the end, of an upload that was not opened here.
        1 => drop(frames.remove(0)),
        // The opening and the end alone.
        2 => drop(frames.drain(1..last)),
        // The opening and some chunks, and then nothing.
        3 => frames.truncate(random.random_range(1..=last)),
        _ => {}
    }
    frames
}

//! A device that sends what is damaged: genuine frames with flipped bits, and garbage of any length; on the enrolment ALPN too,
//! as a stranger.

use std::sync::Arc;

use anyhow::{Result, bail};
use commonweal_protocol::{
    Digest, EnrolmentReply, FRAME_VERSION, Fetch, Reply, Request, bounds::CHUNK_BYTES_MAX, encode,
};
use commonweal_transport::Purpose;
use rand::{Rng as _, RngCore as _};
use rand_chacha::ChaCha8Rng;

use super::{
    Kind, Site,
    member::{Member, POLL},
    raw::{End, Raw, try_frames},
    slow,
};

/// Between two tries.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 20..=80;
/// A task is asked for once in so many tries.
const TASK_SHARE: u32 = 4;
/// One try in so many is a stranger's.
const STRANGER_SHARE: u32 = 4;
/// Bits flipped in one frame, at most.
const BITS_MAX: u32 = 8;

/// See the module.
pub(super) async fn damage(site: Arc<Site>, member: Arc<Member>, mut random: ChaCha8Rng) -> Result<()> {
    while !site.is_over() {
        if random.random_ratio(1, TASK_SHARE)
            && let Some(task) = member.task(&mut random).await?
        {
            member.make(&task)?;
        }
        if random.random_ratio(1, STRANGER_SHARE) {
            let wire = site.stranger(&mut random)?;
            let frame = if random.random() {
                flipped(slow::enrolment(&mut random)?, &mut random)
            } else {
                garbage(&mut random)
            };
            let said = site.count(Kind::Corrupted, async {
                let mut raw = match Raw::open(&wire, Purpose::Transfer).await {
                    Ok(raw) => raw,
                    Err(end) => return Ok(end),
                };
                raw.say(&frame).await;
                match raw.last_word::<EnrolmentReply>().await {
                    // The only answer that is no refusal.
                    End::Answered => bail!("a stranger was enrolled"),
                    end => Ok(end),
                }
            });
            said.await?;
        } else {
            let frames = damaged(&member, &mut random)?;
            let link = member.link(&mut random)?;
            let said =
                site.count(Kind::Corrupted, async { Ok(try_frames::<Reply>(link.wire(), frames).await) });
            // A bit of the announcement that means nothing here, such as the number of samples.
            if let End::Receipt(receipt) = said.await? {
                member.note(*receipt)?;
            }
        }
        site.pause(&mut random, PAUSE_MS).await;
    }
    Ok(())
}

/// What is sent on a device's stream.
fn damaged(member: &Member, random: &mut ChaCha8Rng) -> Result<Vec<Vec<u8>>> {
    match random.random_range(0..4) {
        0 => Ok(vec![question(random)?]),
        1 => Ok(vec![garbage(random)]),
        _ => {
            let Some(delivery) = member.recall(random) else { return Ok(vec![question(random)?]) };
            let mut frames = delivery.frames()?;
            let index = random.random_range(0..frames.len());
            // Garbage in the midst of an upload, or a frame of it that is damaged.
            frames[index] = match random.random_range(0..4) {
                0 => garbage(random),
                _ => flipped(std::mem::take(&mut frames[index]), random),
            };
            Ok(frames)
        }
    }
}

/// A poll or a fetch, damaged.
fn question(random: &mut ChaCha8Rng) -> Result<Vec<u8>> {
    let request = if random.random() {
        Request::Poll(POLL)
    } else {
        let mut digest = Digest([0; 32]);
        random.fill_bytes(&mut digest.0);
        Request::Fetch(Fetch { digest, offset: random.random_range(0..1 << 20) })
    };
    Ok(flipped(encode(&request)?, random))
}

fn flipped(mut frame: Vec<u8>, random: &mut ChaCha8Rng) -> Vec<u8> {
    for _ in 0..random.random_range(1..=BITS_MAX) {
        let bit = random.random_range(0..frame.len() * 8);
        frame[bit / 8] ^= 1 << (bit % 8);
    }
    frame
}

/// Any bytes, as often short as long; half of the time behind a header that is right.
fn garbage(random: &mut ChaCha8Rng) -> Vec<u8> {
    let longest = 1usize << random.random_range(0..=CHUNK_BYTES_MAX.ilog2());
    let mut body = vec![0; random.random_range(0..=longest)];
    random.fill_bytes(&mut body);
    let mut bytes = Vec::new();
    if random.random() {
        bytes.extend((body.len() as u32 + 1).to_le_bytes());
        bytes.push(FRAME_VERSION);
    }
    bytes.extend(body);
    bytes
}

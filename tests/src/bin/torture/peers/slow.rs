//! Peers that say a byte now and then, and hold their stream as long as they are let: strangers that never come to the
//! end of their enrolment, and a device with many questions on one connection and uploads on others.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use commonweal_protocol::{
    Chunk, Csr, DeviceReport, Digest, Enroll, EnrolmentReply, EnrolmentRequest, Open, Reply, Request, Token,
    encode,
};
use commonweal_tests::visitor::BASE;
use commonweal_transport::Purpose;
use rand::{Rng as _, RngCore as _};
use rand_chacha::ChaCha8Rng;
use tokio::time::timeout;

use super::{
    Kind, Site,
    member::{Member, POLL},
    raw::{End, Raw, Word},
};
use crate::serving::STALL_MS;

/// Between two bytes.
const BYTE_MS: std::ops::RangeInclusive<u64> = 50..=300;
/// Between two tries.
const PAUSE_MS: std::ops::RangeInclusive<u64> = 50..=250;
/// Longest that a stream which dribbles may be held. A frame that takes longer than a stall to come is given up; the rest is
/// for a machine that is busy.
const HELD_MAX: Duration = Duration::from_millis(10 * STALL_MS);
/// What an upload that never ends announces.
const UPLOAD_BYTES: usize = 1 << 20;
/// About what a signing request has.
const CSR_BYTES: usize = 300;

/// A stranger that dribbles an enrolment.
pub(super) async fn stranger(site: Arc<Site>, mut random: ChaCha8Rng) -> Result<()> {
    while !site.is_over() {
        let wire = site.stranger(&mut random)?;
        let frame = enrolment(&mut random)?;
        let said = site.count(Kind::SlowStrangers, async {
            match Raw::open(&wire, Purpose::Transfer).await {
                Ok(raw) => dribble::<EnrolmentReply>(&site, raw, &frame, &mut random).await,
                Err(end) => Ok(end),
            }
        });
        // The only answer that is no refusal.
        if let End::Answered = said.await? {
            bail!("a stranger was enrolled");
        }
        site.pause(&mut random, PAUSE_MS).await;
    }
    Ok(())
}

/// An enrolment with a token that nobody has.
pub(super) fn enrolment(random: &mut ChaCha8Rng) -> Result<Vec<u8>> {
    let (mut token, mut csr) = (Token([0; 32]), vec![0; CSR_BYTES]);
    random.fill_bytes(&mut token.0);
    random.fill_bytes(&mut csr);
    Ok(encode(&EnrolmentRequest::Enroll(Enroll { token, csr: Csr::new(csr)? }))?)
}

/// A device's question that never comes to its end, on the connection of all of them.
pub(super) async fn question(site: Arc<Site>, member: Arc<Member>, mut random: ChaCha8Rng) -> Result<()> {
    let frame = encode(&Request::Poll(POLL))?;
    while !site.is_over() {
        let link = member.link(&mut random)?;
        let said = site.count(Kind::SlowDevice, async {
            match Raw::open(link.wire(), Purpose::Question).await {
                Ok(raw) => dribble::<Reply>(&site, raw, &frame, &mut random).await,
                Err(end) => Ok(end),
            }
        });
        // To say all of it takes longer than a stall, however the pauses fall.
        if let End::Answered = said.await? {
            bail!("a question that dribbles was borne to its end");
        }
        site.pause(&mut random, PAUSE_MS).await;
    }
    Ok(())
}

/// A device's upload that is opened as it should be, if there is a round for it, and whose first chunk never comes whole.
pub(super) async fn upload(site: Arc<Site>, member: Arc<Member>, mut random: ChaCha8Rng) -> Result<()> {
    while !site.is_over() {
        if let Some(task) = member.task(&mut random).await? {
            let mut digest = Digest([0; 32]);
            random.fill_bytes(&mut digest.0);
            let open = Open {
                round: task.round,
                base: BASE,
                digest,
                length: UPLOAD_BYTES as u64,
                samples: 1,
                report: DeviceReport::default(),
                trace: None,
            };
            let link = member.link(&mut random)?;
            site.count(Kind::SlowDevice, async {
                match Raw::open(link.wire(), Purpose::Transfer).await {
                    Ok(raw) => hold(&site, raw, open, &mut random).await,
                    Err(end) => Ok(end),
                }
            })
            .await?;
        }
        site.pause(&mut random, PAUSE_MS).await;
    }
    Ok(())
}

async fn hold(site: &Site, mut raw: Raw, open: Open, random: &mut ChaCha8Rng) -> Result<End> {
    let opening = encode(&Request::Open(open))?;
    if !raw.say(&opening).await {
        return Ok(raw.last_word::<Reply>().await);
    }
    match timeout(HELD_MAX, raw.hear::<Reply>()).await {
        Ok(Some(Reply::Offset(_))) => {
            let chunk = encode(&Request::Chunk(Chunk::new(0, vec![1; UPLOAD_BYTES])?))?;
            dribble::<Reply>(site, raw, &chunk, random).await
        }
        Ok(Some(reply)) => Ok(reply.end().unwrap_or(End::Answered)),
        Ok(None) | Err(_) => Ok(End::Ended),
    }
}

/// Says a frame byte by byte until the aggregator has had enough.
///
/// # Errors
/// It bears it without end.
async fn dribble<W: Word>(site: &Site, mut raw: Raw, frame: &[u8], random: &mut ChaCha8Rng) -> Result<End> {
    let begun = Instant::now();
    for byte in frame {
        if site.is_over() || !raw.say(std::slice::from_ref(byte)).await {
            break;
        }
        let pause = Duration::from_millis(random.random_range(BYTE_MS));
        if let Ok(heard) = timeout(pause, raw.hear::<W>()).await {
            return Ok(heard.map_or(End::Ended, |word| word.end().unwrap_or(End::Answered)));
        }
        if begun.elapsed() > HELD_MAX {
            bail!("a stream that dribbles was held for {} s", HELD_MAX.as_secs());
        }
    }
    Ok(raw.last_word::<W>().await)
}

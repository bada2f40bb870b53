//! SCAFFOLD on the aggregator: the changes of the devices' control variates become the server's next one.
//!
//! A part of the merge stage. The result belongs to the round, not to the release: the devices keep theirs whether or
//! not the candidate is published, and a roll-back does not reach them.

use std::collections::BTreeMap;

use commonweal_adapter::{Adapter, AdapterKind, Clip, Trainable, pair, scaffold};
use commonweal_protocol::{Control, DeviceId, Digest, RoundId, SignedControl, bounds};

use super::remember::Found;
use super::{Driver, Stages, is_lost};
use crate::merge::{self, CandidateError, Member};
use crate::receive::chain;
use crate::receive::enroll::Registry;
use crate::store::{Blob, StoreError};

/// A change longer than so many times the round's median is clipped. Changes differ more than deltas do, and what is
/// clipped away stays on its device: a bound for the worst, far from the ordinary.
const CLIP_MEDIAN_FACTOR: f64 = 4.0;

impl<S: Stages> Driver<S> {
    /// Merges the changes that came with the updates `digests` into the control variate; stored and signed.
    pub(super) fn correct(
        &self,
        round: RoundId,
        members: &[Member],
        digests: &BTreeMap<DeviceId, Digest>,
        trainable: Trainable,
    ) -> Found<SignedControl> {
        let before = self.parts.desk.control();
        let server = match before {
            None => Adapter::zeros(self.base.layout.clone()),
            Some(before) => match self.load(&before.control.digest, AdapterKind::Control)? {
                Ok(server) => server,
                Err(reason) => return Ok(Err(reason)),
            },
        };
        // Each device counts once, as in the paper; the norms known are those of the deltas.
        let members: Vec<Member> =
            members.iter().map(|member| Member { samples: 1, norm: None, staleness: 0, ..*member }).collect();
        let is_bounded = !self.parts.config.plain && self.parts.config.merge.clip() != Clip::Off;
        let clip = if is_bounded { Clip::Median { factor: CLIP_MEDIAN_FACTOR } } else { Clip::Off };
        let options = merge::Options::unweighted(clip, trainable);
        let blob = &self.parts.storage.blob;
        let merged = merge::merge(server.layout(), &members, &options, |device| {
            read_part(blob.as_ref(), digests, device, |(_, control)| control.to_vec())
        });
        let change = match merged {
            Ok((change, _)) => change,
            Err(CandidateError::Read { source, .. }) if !is_lost(&source) => return Err(source.into()),
            Err(error) => return Ok(Err(chain(&error))),
        };
        let devices = Registry::new(self.parts.storage.coord.clone()).served()?.len();
        let next = match scaffold::advance(&server, &change, members.len(), devices) {
            Ok(next) => next,
            Err(error) => return Ok(Err(chain(&error))),
        };
        let digest = match self.keep(&next, AdapterKind::Control)? {
            Ok(digest) => digest,
            Err(reason) => return Ok(Err(reason)),
        };
        let length = self.parts.storage.blob.length(&digest)?.unwrap_or_default();
        let merged = Control::merged_with(before.as_ref().map(|before| &before.control), round);
        let control = Control { round, merged, base: self.parts.base, digest, length };
        Ok(SignedControl::sign(self.parts.signer.keys().signing(), control).map_err(|error| chain(&error)))
    }
}

/// One of the two parts of a device's update. What has none, which `receive` lets not in, then does not decode.
pub(super) fn read_part(
    blob: &dyn Blob,
    digests: &BTreeMap<DeviceId, Digest>,
    device: &DeviceId,
    part: impl Fn((&[u8], &[u8])) -> Vec<u8>,
) -> Result<Vec<u8>, StoreError> {
    let missing = || StoreError::Missing { subject: format!("update of {device}") };
    let bytes = blob.read_all(digests.get(device).ok_or_else(missing)?, bounds::UPDATE_BYTES_MAX)?;
    Ok(match pair::split(&bytes) {
        Ok(parts) => part(parts),
        Err(_) => bytes,
    })
}

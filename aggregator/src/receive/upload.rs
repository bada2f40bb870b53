//! An update on its way in: opened, received chunk by chunk, checked, made durable, signed for.
//!
//! `partial` keeps the bytes that are not yet whole; `desk` takes the update into the round.

use std::io;
use std::panic::resume_unwind;
use std::sync::PoisonError;
use std::thread;

use commonweal_adapter::pair;
use commonweal_protocol::{
    Accepted, Chunk, DeviceId, Digest, Open, Receipt, Refusal, Refused, RoundId, SignedReceipt, UploadKey,
};
use commonweal_transport::Opened;

use super::{Opening, Receiver, chain};
use crate::desk::{self, DeskError, Taken};
use crate::round::NotAdmitted;

/// A smaller chunk, unless it is the last, counts as a request: each chunk costs an fsync, whatever its length.
const CHUNK_FREE_BYTES_MIN: usize = 64 << 10;

/// Times that an update's bytes are stored until the round takes it.
const PASSES_MAX: u32 = 3;

/// Does what needs much memory on a thread that ends with it. Allocators keep a part of what a thread gave back for that
/// thread, and would keep an update's worth for each of those that answer requests. Where there are more threads than
/// the allocator keeps apart, it does so still: docs/performance.md has the setting.
fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panicked| resume_unwind(panicked)))
}

impl Receiver {
    /// Opens or resumes an upload.
    pub fn open(&self, device: DeviceId, open: Open) -> Result<Opened, Refused> {
        const REQUEST: &str = "open";
        let _lane = self.lane(device);
        let refuse = |reason, detail: String| {
            Err(self.refuse_update(Some(device), REQUEST, Some(open.digest), reason, detail))
        };
        if open.base != self.parts.base {
            return refuse(Refusal::WrongBase, format!("expected {}, got {}", self.parts.base, open.base));
        }
        self.parts.desk.look().map_err(|error| self.failed(device, REQUEST, &error))?;
        let taken = self.parts.desk.taken(open.round, &device);
        if let Some((into, before)) = taken.map_err(|error| self.failed(device, REQUEST, &error))? {
            return self.repeat(device, REQUEST, &open.key(), into, &before).map(Opened::Done);
        }
        if let Err(error) = self.parts.desk.admits(open.round, &device) {
            return Err(self.not_admitted(device, REQUEST, open.digest, error));
        }
        let bytes_max = self.bytes_max(open.round);
        if open.length > bytes_max as u64 {
            let detail = format!("expected at most {bytes_max} bytes, got {}", open.length);
            return refuse(Refusal::TooLarge, detail);
        }
        let key = open.key();
        let offset = self.make_room(device, &open).map_err(|error| {
            // A disk that is full for the moment: the device keeps its update and comes back.
            self.refuse_update(Some(device), REQUEST, Some(open.digest), Refusal::Busy, error)
        })?;
        if offset > open.length {
            self.discard(device, &key);
            self.begin(device, open);
            return Ok(Opened::Resume(0));
        }
        self.begin(device, open);
        Ok(Opened::Resume(offset))
    }

    /// Remembers what the device brings, and since when: one that it opens again it began before.
    fn begin(&self, device: DeviceId, open: Open) {
        let now_ms = self.now_ms();
        let mut live = self.live();
        let before = live.opens.get(&device).filter(|before| before.open.key() == open.key());
        let since_ms = before.map_or(now_ms, |before| before.since_ms);
        live.opens.insert(device, Opening { open, since_ms });
    }

    /// The offset to go on from, if there is room for the rest, twice: once as it comes in, once kept. Both may be on one
    /// disk, so that each has to have room for both; a store without a known end has it.
    fn make_room(&self, device: DeviceId, open: &Open) -> Result<u64, String> {
        let partials = &self.parts.partials;
        let key = open.key();
        partials.discard_others(&device, &key).map_err(|error| error.to_string())?;
        let offset = partials.offset(&device, &key).map_err(|error| error.to_string())?;
        let here = partials.free_bytes().map_err(|error| error.to_string())?;
        let kept = self.parts.storage.blob.free_bytes().map_err(|error| chain(&error))?;
        let free = [here, kept].into_iter().flatten().min();
        let promised: u64 = {
            let mut live = self.live();
            // Nothing more comes of a round that is over.
            let oldest = self.oldest_round(open.round);
            live.opens.retain(|_, other| other.open.round >= oldest);
            live.opens.iter().filter(|(other, _)| **other != device).map(|(_, other)| other.open.length).sum()
        };
        let needed = (open.length.saturating_sub(offset))
            .saturating_add(open.length)
            .saturating_add(promised.saturating_mul(2))
            .saturating_add(self.parts.config.receive.reserve_bytes);
        match free {
            Some(free) if free < needed => Err(format!("expected {needed} free bytes, got {free}")),
            _ => Ok(offset),
        }
    }

    /// Appends a chunk; durable on return.
    pub fn chunk(&self, device: DeviceId, key: UploadKey, chunk: &Chunk) -> Result<u64, Refused> {
        const REQUEST: &str = "chunk";
        let _lane = self.lane(device);
        let Opening { open, .. } = self.opened(device, &key, REQUEST)?;
        let refuse = |reason, detail: String| {
            Err(self.refuse_update(Some(device), REQUEST, Some(key.digest), reason, detail))
        };
        if let Err(error) = self.parts.desk.admits(key.round, &device) {
            self.let_go(device, &key, &error);
            return Err(self.not_admitted(device, REQUEST, key.digest, error));
        }
        if !chunk.is_intact() {
            return refuse(Refusal::ChunkCorrupt, format!("at offset {}", chunk.offset));
        }
        if chunk.end() > open.length {
            let detail = format!("expected {} bytes, got {}", open.length, chunk.end());
            return refuse(Refusal::LengthMismatch, detail);
        }
        let held = match self.parts.partials.offset(&device, &key) {
            Ok(held) => held,
            Err(error) => return Err(self.failed(device, REQUEST, &error)),
        };
        if chunk.offset != held {
            return refuse(Refusal::OffsetMismatch, format!("expected {held}, got {}", chunk.offset));
        }
        let is_small = chunk.bytes.len() < CHUNK_FREE_BYTES_MIN && chunk.end() < open.length;
        if is_small && !self.live().rates.spend_request(device, self.now_ms()) {
            return refuse(Refusal::Busy, "sent too many small chunks".to_owned());
        }
        if !self.live().rates.spend_bytes(device, key.round, chunk.bytes.len() as u64) {
            return refuse(Refusal::Busy, "sent its bytes of this round too often".to_owned());
        }
        let end = self.parts.partials.append(&device, &key, chunk.offset, &chunk.bytes).map_err(|error| {
            let reason = match error.kind() {
                io::ErrorKind::StorageFull => Refusal::Busy,
                _ => Refusal::Internal,
            };
            self.refuse_update(Some(device), REQUEST, Some(key.digest), reason, error)
        })?;
        self.parts.pause.here("upload", &self.parts.events);
        Ok(end)
    }

    /// What would be sent for nothing. While a buffer is merged nothing is: the device comes back and goes on.
    fn let_go(&self, device: DeviceId, key: &UploadKey, error: &NotAdmitted) {
        if !matches!(error, NotAdmitted::Merging { .. }) {
            self.forget(device, key);
        }
    }

    fn opened(&self, device: DeviceId, key: &UploadKey, request: &'static str) -> Result<Opening, Refused> {
        match self.live().opens.get(&device) {
            Some(opening) if opening.open.key() == *key => Ok(*opening),
            _ => Err(Refused { reason: Refusal::UploadUnknown, reconnect: self.reconnect() }),
        }
        .inspect_err(|_| tracing::debug!(%device, request, "no such upload is open"))
    }

    /// Checks the whole, makes it durable, signs.
    pub fn finish(&self, device: DeviceId, key: UploadKey) -> Result<Accepted, Refused> {
        const REQUEST: &str = "finish";
        let _lane = self.lane(device);
        self.parts.desk.look().map_err(|error| self.failed(device, REQUEST, &error))?;
        let taken = self.parts.desk.taken(key.round, &device);
        if let Some((into, before)) = taken.map_err(|error| self.failed(device, REQUEST, &error))? {
            return self.repeat(device, REQUEST, &key, into, &before);
        }
        let Opening { open, since_ms } = self.opened(device, &key, REQUEST)?;
        if let Err(error) = self.parts.desk.admits(key.round, &device) {
            self.let_go(device, &key, &error);
            return Err(self.not_admitted(device, REQUEST, key.digest, error));
        }
        let norm = self.check_whole(device, &open)?;
        let received_ms = self.now_ms();
        let receipt =
            Receipt { round: open.round, device, digest: open.digest, length: open.length, received_ms };
        let receipt = SignedReceipt::sign(self.parts.signer.keys().signing(), receipt)
            .map_err(|error| self.failed(device, REQUEST, &error))?;
        let accepted =
            desk::Accepted { open, receipt, norm: Some(norm), start: None, opened_ms: Some(since_ms) };
        match self.keep(device, &accepted)? {
            Taken::Now => {
                self.parts.pause.here("receipt", &self.parts.events);
                self.forget(device, &key);
                Ok(Accepted { receipt, reconnect: self.reconnect() })
            }
            Taken::Before(into, before) => self.repeat(device, REQUEST, &key, into, &before),
        }
    }

    /// Checks the whole; its norm.
    fn check_whole(&self, device: DeviceId, open: &Open) -> Result<f64, Refused> {
        const REQUEST: &str = "finish";
        let _whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        apart(|| {
            let bytes = self.read_whole(device, open)?;
            self.check_update(open.round, &bytes).map_err(|detail| {
                self.forget(device, &open.key());
                self.refuse_update(Some(device), REQUEST, Some(open.digest), Refusal::UpdateUnusable, detail)
            })
        })
    }

    /// Stores the bytes, and takes the update into the round. No sweep takes the bytes away in between; where one came, they
    /// are stored again.
    fn keep(&self, device: DeviceId, accepted: &desk::Accepted) -> Result<Taken, Refused> {
        const REQUEST: &str = "finish";
        let (desk, open) = (&self.parts.desk, &accepted.open);
        for _ in 0..PASSES_MAX {
            let pass = match desk.pass() {
                Err(DeskError::Shut) => continue,
                pass => pass.map_err(|error| self.failed(device, REQUEST, &error))?,
            };
            let mut source = match self.parts.partials.read(&device, &open.key()) {
                // Its round closed while this waited, and what was held for it is gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(Refused { reason: Refusal::UploadUnknown, reconnect: self.reconnect() });
                }
                read => read.map_err(|error| self.failed(device, REQUEST, &error))?,
            };
            let blob = &self.parts.storage.blob;
            blob.put_if_absent(&open.digest, open.length, source.as_mut())
                .map_err(|error| self.failed(device, REQUEST, &error))?;
            match desk.take(self.now_ms(), accepted, &pass) {
                Ok(taken) => return Ok(taken),
                Err(DeskError::Shut) => {}
                Err(DeskError::NotAdmitted(error)) => {
                    // The round closed meanwhile: a late update is discarded, and its device knows.
                    self.let_go(device, &open.key(), &error);
                    return Err(self.not_admitted(device, REQUEST, open.digest, error));
                }
                Err(error) => return Err(self.failed(device, REQUEST, &error)),
            }
        }
        // Ordinary while a round is closed, and the device comes back with it.
        tracing::debug!(%device, "to come back: updates are not taken at this moment");
        Err(Refused { reason: Refusal::Busy, reconnect: self.reconnect() })
    }

    /// The same answer as before for the same update, in the word of the key in force; another one is refused.
    fn repeat(
        &self,
        device: DeviceId,
        request: &'static str,
        key: &UploadKey,
        into: RoundId,
        before: &desk::Accepted,
    ) -> Result<Accepted, Refused> {
        self.forget(device, key);
        if before.open.digest != key.digest {
            let detail = format!("accepted {}, got {}", before.open.digest, key.digest);
            return Err(self.refuse_update(
                Some(device),
                request,
                Some(key.digest),
                Refusal::AlreadySent,
                detail,
            ));
        }
        // Counts it now if a failing store kept that from happening then.
        let counted = self.parts.desk.count_again(self.now_ms(), into, device);
        counted.map_err(|error| self.failed(device, request, &error))?;
        let receipt = self.parts.signer.keys().again(before.receipt);
        let receipt = receipt.map_err(|error| self.failed(device, request, &error))?;
        Ok(Accepted { receipt, reconnect: self.reconnect() })
    }

    /// All bytes of an upload, of the announced length and digest; anything else is dropped.
    fn read_whole(&self, device: DeviceId, open: &Open) -> Result<Vec<u8>, Refused> {
        const REQUEST: &str = "finish";
        let key = open.key();
        let held = self
            .parts
            .partials
            .offset(&device, &key)
            .map_err(|error| self.failed(device, REQUEST, &error))?;
        let refuse = |reason, detail: String| {
            self.discard(device, &key);
            Err(self.refuse_update(Some(device), REQUEST, Some(open.digest), reason, detail))
        };
        if held != open.length {
            return refuse(Refusal::LengthMismatch, format!("expected {} bytes, got {held}", open.length));
        }
        let mut bytes = Vec::with_capacity(open.length as usize);
        let read = self.parts.partials.read(&device, &key).and_then(|mut source| {
            io::Read::read_to_end(&mut io::Read::take(&mut source, open.length), &mut bytes)
        });
        if let Err(error) = read {
            return Err(self.failed(device, REQUEST, &error));
        }
        let found = Digest::of(&bytes);
        if found != open.digest {
            return refuse(Refusal::DigestMismatch, format!("expected {}, got {found}", open.digest));
        }
        Ok(bytes)
    }

    /// The norm of the update that the bytes are, if the round can merge it.
    fn check_update(&self, round: RoundId, bytes: &[u8]) -> Result<f64, String> {
        let train = &self.parts.config.train;
        let (delta, control) =
            pair::decode(bytes, &self.parts.layout, train.trainable(round), train.scaffold)
                .map_err(|error| chain(&error))?;
        let norm_max = self.parts.config.receive.norm_max;
        let delta_norm = delta.norm();
        for (what, norm) in [("norm", Some(delta_norm)), ("control's norm", control.map(|c| c.norm()))] {
            if !norm.is_none_or(|norm| norm.is_finite() && norm <= norm_max) {
                let got = norm.unwrap_or_default();
                return Err(format!("expected a {what} of at most {norm_max}, got {got}"));
            }
        }
        Ok(delta_norm)
    }

    fn discard(&self, device: DeviceId, key: &UploadKey) {
        if let Err(error) = self.parts.partials.discard(&device, key) {
            tracing::warn!(%device, %error, "an unfinished upload could not be removed");
        }
    }

    fn forget(&self, device: DeviceId, key: &UploadKey) {
        self.discard(device, key);
        let mut live = self.live();
        if live.opens.get(&device).is_some_and(|opening| opening.open.key() == *key) {
            live.opens.remove(&device);
        }
    }
}

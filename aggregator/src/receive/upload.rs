//! An update on its way in: opened, received chunk by chunk, checked, made durable, signed for.
//!
//! `partial` keeps the bytes that are not yet whole; `desk` takes the update into the round.

use std::panic::resume_unwind;
use std::sync::{PoisonError, RwLockReadGuard};
use std::thread;

use commonweal_adapter::pair;
use commonweal_protocol::{
    Accepted, Chunk, DeviceId, Digest, Open, Receipt, Refusal, Refused, RoundId, SignedReceipt, UploadKey,
};
use commonweal_transport::Opened;

use super::{Receiver, chain};
use crate::desk::{self, DeskError, Taken};
use crate::round::NotAdmitted;

/// A smaller chunk, unless it is the last, counts as a request: each chunk costs an fsync, whatever its length.
const CHUNK_FREE_BYTES_MIN: usize = 64 << 10;

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
        let refuse = |reason, detail: String| Err(self.refuse(Some(device), REQUEST, reason, detail));
        if open.base != self.parts.base {
            return refuse(Refusal::WrongBase, format!("expected {}, got {}", self.parts.base, open.base));
        }
        let taken = self.parts.desk.taken(open.round, &device);
        if let Some((into, before)) = taken.map_err(|error| self.failed(device, REQUEST, &error))? {
            return self.repeat(device, REQUEST, &open.key(), into, &before).map(Opened::Done);
        }
        if let Err(error) = self.parts.desk.admits(open.round, &device) {
            return Err(self.not_admitted(device, REQUEST, error));
        }
        let bytes_max = self.bytes_max(open.round);
        if open.length > bytes_max as u64 {
            let detail = format!("expected at most {bytes_max} bytes, got {}", open.length);
            return refuse(Refusal::TooLarge, detail);
        }
        let key = open.key();
        let offset = self.make_room(device, &open).map_err(|error| {
            // A disk that is full for the moment: the device keeps its update and comes back.
            self.refuse(Some(device), REQUEST, Refusal::Busy, error)
        })?;
        if offset > open.length {
            self.discard(device, &key);
            self.live().opens.insert(device, open);
            return Ok(Opened::Resume(0));
        }
        self.live().opens.insert(device, open);
        Ok(Opened::Resume(offset))
    }

    /// The offset to go on from, if the disk has room for the rest, twice: once as it comes in, once kept.
    fn make_room(&self, device: DeviceId, open: &Open) -> Result<u64, String> {
        let partials = &self.parts.partials;
        let key = open.key();
        partials.discard_others(&device, &key).map_err(|error| error.to_string())?;
        let offset = partials.offset(&device, &key).map_err(|error| error.to_string())?;
        let free = self.parts.storage.blob.free_bytes().map_err(|error| chain(&error))?;
        let promised: u64 = {
            let mut live = self.live();
            // Nothing more comes of a round that is over.
            let oldest = self.oldest_round(open.round);
            live.opens.retain(|_, other| other.round >= oldest);
            live.opens.iter().filter(|(other, _)| **other != device).map(|(_, open)| open.length).sum()
        };
        let needed = (open.length.saturating_sub(offset))
            .saturating_add(open.length)
            .saturating_add(promised.saturating_mul(2))
            .saturating_add(self.parts.config.receive.reserve_bytes);
        if free < needed { Err(format!("expected {needed} free bytes, got {free}")) } else { Ok(offset) }
    }

    /// Appends a chunk; durable on return.
    pub fn chunk(&self, device: DeviceId, key: UploadKey, chunk: &Chunk) -> Result<u64, Refused> {
        const REQUEST: &str = "chunk";
        let _lane = self.lane(device);
        let open = self.opened(device, &key, REQUEST)?;
        let refuse = |reason, detail: String| Err(self.refuse(Some(device), REQUEST, reason, detail));
        if let Err(error) = self.parts.desk.admits(key.round, &device) {
            self.let_go(device, &key, &error);
            return Err(self.not_admitted(device, REQUEST, error));
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
                std::io::ErrorKind::StorageFull => Refusal::Busy,
                _ => Refusal::Internal,
            };
            self.refuse(Some(device), REQUEST, reason, error)
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

    fn opened(&self, device: DeviceId, key: &UploadKey, request: &'static str) -> Result<Open, Refused> {
        match self.live().opens.get(&device) {
            Some(open) if open.key() == *key => Ok(*open),
            _ => Err(Refused { reason: Refusal::UploadUnknown, reconnect: self.reconnect() }),
        }
        .inspect_err(|_| tracing::debug!(%device, request, "no such upload is open"))
    }

    /// Checks the whole, makes it durable, signs.
    pub fn finish(&self, device: DeviceId, key: UploadKey) -> Result<Accepted, Refused> {
        const REQUEST: &str = "finish";
        let _lane = self.lane(device);
        let taken = self.parts.desk.taken(key.round, &device);
        if let Some((into, before)) = taken.map_err(|error| self.failed(device, REQUEST, &error))? {
            return self.repeat(device, REQUEST, &key, into, &before);
        }
        let open = self.opened(device, &key, REQUEST)?;
        if let Err(error) = self.parts.desk.admits(key.round, &device) {
            self.let_go(device, &key, &error);
            return Err(self.not_admitted(device, REQUEST, error));
        }
        let (blobs, norm) = self.keep(device, &open)?;
        let received_ms = self.now_ms();
        let receipt =
            Receipt { round: open.round, device, digest: open.digest, length: open.length, received_ms };
        let receipt = SignedReceipt::sign(self.parts.signer.keys().signing(), receipt)
            .map_err(|error| self.failed(device, REQUEST, &error))?;
        let accepted = desk::Accepted { open, receipt, norm: Some(norm), start: None };
        let taken = self.parts.desk.take(received_ms, &accepted);
        drop(blobs);
        match taken {
            Ok(Taken::Now) => {
                self.parts.pause.here("receipt", &self.parts.events);
                self.forget(device, &key);
                Ok(Accepted { receipt, reconnect: self.reconnect() })
            }
            Ok(Taken::Before(into, before)) => self.repeat(device, REQUEST, &key, into, &before),
            Err(DeskError::NotAdmitted(error)) => {
                // The round closed meanwhile: a late update is discarded, and its device knows.
                self.let_go(device, &key, &error);
                Err(self.not_admitted(device, REQUEST, error))
            }
            Err(error) => Err(self.failed(device, REQUEST, &error)),
        }
    }

    /// Checks the whole and stores it; no sweep takes it away while the guard is held. With it, the update's norm.
    fn keep(&self, device: DeviceId, open: &Open) -> Result<(RwLockReadGuard<'_, ()>, f64), Refused> {
        const REQUEST: &str = "finish";
        let _whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, norm) = apart(|| -> Result<_, Refused> {
            let bytes = self.read_whole(device, open)?;
            let norm = self.check_update(open.round, &bytes).map_err(|detail| {
                self.forget(device, &open.key());
                self.refuse(Some(device), REQUEST, Refusal::UpdateUnusable, detail)
            })?;
            Ok((bytes, norm))
        })?;
        let blobs = self.parts.desk.keep_blobs();
        let blob = &self.parts.storage.blob;
        blob.put_if_absent(&open.digest, open.length, &mut bytes.as_slice())
            .map_err(|error| self.failed(device, REQUEST, &error))?;
        Ok((blobs, norm))
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
            return Err(self.refuse(Some(device), request, Refusal::AlreadySent, detail));
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
            Err(self.refuse(Some(device), REQUEST, reason, detail))
        };
        if held != open.length {
            return refuse(Refusal::LengthMismatch, format!("expected {} bytes, got {held}", open.length));
        }
        let mut bytes = Vec::with_capacity(open.length as usize);
        let read = self.parts.partials.read(&device, &key).and_then(|mut source| {
            std::io::Read::read_to_end(&mut std::io::Read::take(&mut source, open.length), &mut bytes)
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
        if live.opens.get(&device).is_some_and(|open| open.key() == *key) {
            live.opens.remove(&device);
        }
    }
}

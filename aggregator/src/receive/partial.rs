//! Updates on their way in: one file for each upload, appended chunk by chunk and fsynced before the
//! offset is acknowledged. The file's length *is* the durable offset, so a killed process has nothing to
//! repair; a whole that does not hash right is dropped at the end.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use commonweal_protocol::{DeviceId, UploadKey};

use crate::store::Disk;

/// Where unfinished uploads are kept.
pub trait Partials: Send + Sync {
    /// Bytes held of an upload; 0 if none.
    fn offset(&self, device: &DeviceId, key: &UploadKey) -> io::Result<u64>;
    /// Appends at `offset`, which must be where the bytes held end; durable on return.
    fn append(&self, device: &DeviceId, key: &UploadKey, offset: u64, bytes: &[u8]) -> io::Result<u64>;
    /// Reads all that is held.
    fn read(&self, device: &DeviceId, key: &UploadKey) -> io::Result<Box<dyn Read>>;
    /// Forgets an upload; absent is not an error.
    fn discard(&self, device: &DeviceId, key: &UploadKey) -> io::Result<()>;
    /// Forgets every upload of a device for a round but this one: a device has one open upload.
    fn discard_others(&self, device: &DeviceId, keep: &UploadKey) -> io::Result<()>;
    /// Forgets what belongs to rounds before `round`.
    fn discard_before(&self, round: u64) -> io::Result<()>;
    /// Bytes held of all uploads, to keep free what has been promised.
    fn bytes_held(&self) -> io::Result<u64>;
    /// Free bytes where they are kept; none where no end is known.
    fn free_bytes(&self) -> io::Result<Option<u64>>;
}

/// Files `ROUND-DEVICE-DIGEST.part` in one directory.
#[derive(Debug)]
pub struct PartialFiles {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
}

impl PartialFiles {
    /// Opens or creates `dir`.
    pub fn open(dir: &Path, disk: Arc<dyn Disk>) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned(), disk })
    }

    fn path(&self, device: &DeviceId, key: &UploadKey) -> PathBuf {
        self.dir.join(format!("{}-{device}-{}.part", key.round, key.digest))
    }

    fn each(&self, mut visit: impl FnMut(&Path, u64, &str) -> io::Result<()>) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let Some((round, rest)) = name.split_once('-') else { continue };
            if let (Ok(round), Some(rest)) = (round.parse(), rest.strip_suffix(".part")) {
                visit(&path, round, rest)?;
            }
        }
        Ok(())
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

impl Partials for PartialFiles {
    fn offset(&self, device: &DeviceId, key: &UploadKey) -> io::Result<u64> {
        match fs::metadata(self.path(device, key)) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn append(&self, device: &DeviceId, key: &UploadKey, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        let path = self.path(device, key);
        let is_new = !path.exists();
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        let held = file.metadata()?.len();
        if held != offset {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("expected offset {held}, got {offset}"),
            ));
        }
        let written = self.disk.write(&mut file, bytes).and_then(|()| file.sync_data());
        if let Err(error) = written {
            // What a full disk took of the chunk is cut off again.
            file.set_len(offset)?;
            return Err(error);
        }
        if is_new {
            crate::store::sync_dir(&self.dir)?;
        }
        Ok(offset + bytes.len() as u64)
    }

    fn read(&self, device: &DeviceId, key: &UploadKey) -> io::Result<Box<dyn Read>> {
        Ok(Box::new(File::open(self.path(device, key))?))
    }

    fn discard(&self, device: &DeviceId, key: &UploadKey) -> io::Result<()> {
        absent_is_fine(fs::remove_file(self.path(device, key)))
    }

    fn discard_others(&self, device: &DeviceId, keep: &UploadKey) -> io::Result<()> {
        let device = device.to_string();
        let keep = keep.digest.to_string();
        self.each(|path, _, rest| match rest.split_once('-') {
            Some((owner, digest)) if owner == device && digest != keep => {
                absent_is_fine(fs::remove_file(path))
            }
            _ => Ok(()),
        })
    }

    fn discard_before(&self, round: u64) -> io::Result<()> {
        self.each(|path, of, _| if of < round { absent_is_fine(fs::remove_file(path)) } else { Ok(()) })
    }

    fn bytes_held(&self) -> io::Result<u64> {
        let mut bytes = 0;
        self.each(|path, _, _| {
            bytes += fs::metadata(path).map_or(0, |metadata| metadata.len());
            Ok(())
        })?;
        Ok(bytes)
    }

    fn free_bytes(&self) -> io::Result<Option<u64>> {
        self.disk.free_bytes(&self.dir).map(Some)
    }
}

type Held = BTreeMap<(DeviceId, UploadKey), Vec<u8>>;

/// The same in memory, for simulations.
#[derive(Clone, Debug, Default)]
pub struct PartialMemory {
    held: Arc<Mutex<Held>>,
}

impl PartialMemory {
    fn with<T>(&self, change: impl FnOnce(&mut Held) -> T) -> T {
        change(&mut self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Partials for PartialMemory {
    fn offset(&self, device: &DeviceId, key: &UploadKey) -> io::Result<u64> {
        Ok(self.with(|held| held.get(&(*device, *key)).map_or(0, |bytes| bytes.len() as u64)))
    }

    fn append(&self, device: &DeviceId, key: &UploadKey, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        self.with(|held| {
            let found = held.get(&(*device, *key)).map_or(0, |bytes| bytes.len() as u64);
            if found != offset {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("expected offset {found}, got {offset}"),
                ));
            }
            held.entry((*device, *key)).or_default().extend_from_slice(bytes);
            Ok(offset + bytes.len() as u64)
        })
    }

    fn read(&self, device: &DeviceId, key: &UploadKey) -> io::Result<Box<dyn Read>> {
        let bytes = self.with(|held| held.get(&(*device, *key)).cloned());
        Ok(Box::new(io::Cursor::new(bytes.ok_or(io::ErrorKind::NotFound)?)))
    }

    fn discard(&self, device: &DeviceId, key: &UploadKey) -> io::Result<()> {
        self.with(|held| held.remove(&(*device, *key)));
        Ok(())
    }

    fn discard_others(&self, device: &DeviceId, keep: &UploadKey) -> io::Result<()> {
        self.with(|held| held.retain(|(owner, key), _| owner != device || key == keep));
        Ok(())
    }

    fn discard_before(&self, round: u64) -> io::Result<()> {
        self.with(|held| held.retain(|(_, key), _| key.round.0 >= round));
        Ok(())
    }

    fn bytes_held(&self) -> io::Result<u64> {
        Ok(self.with(|held| held.values().map(|bytes| bytes.len() as u64).sum()))
    }

    fn free_bytes(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use commonweal_protocol::{Digest, RoundId};

    use super::*;
    use crate::store::{RealDisk, SmallDisk};

    fn key(round: u64, digest: u8) -> UploadKey {
        UploadKey { round: RoundId(round), digest: Digest([digest; 32]) }
    }

    const DEVICE: DeviceId = DeviceId([1; 16]);

    fn contract(partials: &dyn Partials) {
        assert_eq!(partials.offset(&DEVICE, &key(1, 1)).unwrap(), 0);
        assert_eq!(partials.append(&DEVICE, &key(1, 1), 0, b"abc").unwrap(), 3);
        assert!(partials.append(&DEVICE, &key(1, 1), 0, b"abc").is_err(), "the same chunk again");
        assert!(partials.append(&DEVICE, &key(1, 1), 4, b"e").is_err(), "a gap");
        assert_eq!(partials.append(&DEVICE, &key(1, 1), 3, b"de").unwrap(), 5);
        let mut bytes = Vec::new();
        partials.read(&DEVICE, &key(1, 1)).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"abcde");
        partials.append(&DEVICE, &key(1, 2), 0, b"x").unwrap();
        partials.append(&DeviceId([2; 16]), &key(1, 3), 0, b"y").unwrap();
        partials.append(&DEVICE, &key(2, 4), 0, b"z").unwrap();
        assert_eq!(partials.bytes_held().unwrap(), 8);
        partials.discard_others(&DEVICE, &key(1, 1)).unwrap();
        assert_eq!(partials.bytes_held().unwrap(), 6, "the other device's stays");
        partials.append(&DEVICE, &key(2, 4), 0, b"z").unwrap();
        partials.discard_before(2).unwrap();
        assert_eq!(partials.bytes_held().unwrap(), 1);
        partials.discard(&DEVICE, &key(2, 4)).unwrap();
        partials.discard(&DEVICE, &key(2, 4)).unwrap();
        assert_eq!(partials.bytes_held().unwrap(), 0);
        assert!(partials.read(&DEVICE, &key(2, 4)).is_err());
    }

    #[test]
    fn memory_keeps_the_contract() {
        contract(&PartialMemory::default());
    }

    #[test]
    fn files_keep_the_contract() {
        let dir = tempfile::tempdir().unwrap();
        contract(&PartialFiles::open(dir.path(), Arc::new(RealDisk)).unwrap());
    }

    #[test]
    fn a_chunk_that_does_not_fit_is_cut_off_and_can_be_sent_again() {
        let dir = tempfile::tempdir().unwrap();
        let full = PartialFiles::open(dir.path(), SmallDisk::with_room(5)).unwrap();
        assert_eq!(full.append(&DEVICE, &key(1, 1), 0, b"abc").unwrap(), 3);
        let error = full.append(&DEVICE, &key(1, 1), 3, b"defg").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(full.offset(&DEVICE, &key(1, 1)).unwrap(), 3);
        let roomy = PartialFiles::open(dir.path(), Arc::new(RealDisk)).unwrap();
        assert_eq!(roomy.append(&DEVICE, &key(1, 1), 3, b"defg").unwrap(), 7);
    }
}

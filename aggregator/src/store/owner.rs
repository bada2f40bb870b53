//! Whose objects a place holds: an object there names the federation, as the database does. Of `store.rs`, at each start.

use super::{Blob, Coord, NAME_BYTES_MAX, StoreError};

/// The log with the federation's name, drawn once.
const FEDERATION: &str = "federation";

/// Each of two federations would delete what only the other names.
pub(super) fn check_owner(coord: &dyn Coord, blob: &dyn Blob) -> Result<(), StoreError> {
    let drawn = format!("{:032x}", rand::random::<u128>());
    let name = match coord.head(FEDERATION)? {
        Some(entry) => entry.value,
        None => match coord.compare_and_set(FEDERATION, 0, drawn.as_bytes()) {
            Ok(_) => drawn.into_bytes(),
            // Another process was faster, or this one was not told.
            Err(error) => coord.head(FEDERATION)?.map(|entry| entry.value).ok_or(error)?,
        },
    };
    let name = String::from_utf8_lossy(&name).into_owned();
    let owner = blob.mark(&name)?;
    if owner == name {
        return Ok(());
    }
    Err(StoreError::Foreign { expected: name, got: owner })
}

/// The object that says whose the others are.
pub(super) const MARK: &str = "federation";

/// What it says, if it can be that.
pub(super) fn owner_of(bytes: Vec<u8>) -> Result<String, StoreError> {
    String::from_utf8(bytes).ok().filter(|owner| owner.len() <= NAME_BYTES_MAX).ok_or_else(|| {
        StoreError::Refused {
            subject: format!("object `{MARK}`"),
            expected: "a federation's name".to_owned(),
            got: "something else".to_owned(),
        }
    })
}

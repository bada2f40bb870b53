//! How much of something one device may hold at once, so that none holds it all. Neighbours: `quic::server` seats
//! connections, `serve` transfers.

use commonweal_protocol::DeviceId;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// So many seats for each device.
#[derive(Debug)]
pub(crate) struct Seats {
    each: u32,
    taken: Mutex<BTreeMap<DeviceId, u32>>,
}

/// One seat of a device, free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Seat<'s> {
    seats: &'s Seats,
    device: DeviceId,
}

impl Seats {
    /// All free.
    pub(crate) fn new(each: u32) -> Self {
        Self { each, taken: Mutex::default() }
    }

    /// A seat for this device, if it has one left.
    pub(crate) fn take(&self, device: DeviceId) -> Option<Seat<'_>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_device = taken.entry(device).or_default();
        if *of_device >= self.each {
            return None;
        }
        *of_device += 1;
        Some(Seat { seats: self, device })
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut taken = self.seats.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_device) = taken.get_mut(&self.device) {
            *of_device -= 1;
            if *of_device == 0 {
                taken.remove(&self.device);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_its_seats_and_nothing_is_kept_of_who_left() {
        let seats = Seats::new(2);
        let device = |number| DeviceId([number; 16]);
        let held = [seats.take(device(1)), seats.take(device(1))];
        assert!(held.iter().all(Option::is_some) && seats.take(device(1)).is_none());
        assert!(seats.take(device(2)).is_some(), "another device's");
        drop(held);
        assert!(seats.take(device(1)).is_some());
        assert!(seats.taken.lock().is_ok_and(|taken| taken.is_empty()));
    }
}

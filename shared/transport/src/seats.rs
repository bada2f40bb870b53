//! How much of something one device or one address may hold at once, so that none holds it all. Neighbours:
//! `quic::server` seats connections, handshakes and enrolments, `serve` transfers.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// So many seats for each holder.
#[derive(Debug)]
pub(crate) struct Seats<K: Ord> {
    each: usize,
    taken: Mutex<BTreeMap<K, usize>>,
}

/// One seat of a holder, free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Seat<'s, K: Ord> {
    seats: &'s Seats<K>,
    holder: K,
}

impl<K: Ord + Copy> Seats<K> {
    /// All free.
    pub(crate) fn new(each: usize) -> Self {
        Self { each, taken: Mutex::default() }
    }

    /// A seat for this holder, if it has one left.
    pub(crate) fn take(&self, holder: K) -> Option<Seat<'_, K>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_holder = taken.entry(holder).or_default();
        if *of_holder >= self.each {
            return None;
        }
        *of_holder += 1;
        Some(Seat { seats: self, holder })
    }
}

impl<K: Ord> Drop for Seat<'_, K> {
    fn drop(&mut self) {
        let mut taken = self.seats.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_holder) = taken.get_mut(&self.holder) {
            *of_holder -= 1;
            if *of_holder == 0 {
                taken.remove(&self.holder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_holder_has_its_seats_and_nothing_is_kept_of_who_left() {
        let seats = Seats::new(2);
        let held = [seats.take(1), seats.take(1)];
        assert!(held.iter().all(Option::is_some) && seats.take(1).is_none());
        assert!(seats.take(2).is_some(), "another's");
        drop(held);
        assert!(seats.take(1).is_some());
        assert!(seats.taken.lock().is_ok_and(|taken| taken.is_empty()));
    }
}

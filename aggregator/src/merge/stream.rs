//! Walks over a round's updates with a few of them in memory, however many there are: read one after the other, decoded
//! and visited side by side.
//!
//! For `merge`, whose sums are the same in any order. Reading keeps the order of the members, so that a store which
//! fails does so in the same place each time.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use commonweal_adapter::{AdapterDelta, DecodeError};
use commonweal_protocol::DeviceId;

use super::{CandidateError, Member};

/// Most updates that are decoded at once, and so threads; what they add up in is one, and they wait for it.
const THREADS_MAX: usize = 8;
/// Most values of all updates that are decoded at once, unless one alone has more: 256 MiB of f32.
const DECODED_VALUES_MAX: usize = 1 << 26;

/// Threads for updates of so many values.
pub(super) fn threads(values: usize) -> usize {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    cores.min(THREADS_MAX).min(DECODED_VALUES_MAX / values.max(1)).max(1)
}

/// Members still to be read, how to, and the first of those that went wrong.
struct Queue<'m, R, E> {
    members: std::iter::Enumerate<std::slice::Iter<'m, Member>>,
    read: R,
    failed: Option<(usize, CandidateError<E>)>,
}

impl<R: FnMut(&DeviceId) -> Result<Vec<u8>, E>, E> Queue<'_, R, E> {
    /// The next member and its bytes; none at the end, and after a failure.
    fn next(&mut self) -> Option<(usize, DeviceId, Vec<u8>)> {
        if self.failed.is_some() {
            return None;
        }
        let (place, member) = self.members.next()?;
        let device = member.device;
        match (self.read)(&device) {
            Ok(bytes) => Some((place, device, bytes)),
            Err(source) => {
                self.fail(place, CandidateError::Read { device, source });
                None
            }
        }
    }

    /// Of several failures the first member's counts: all before it were begun before it.
    fn fail(&mut self, place: usize, error: CandidateError<E>) {
        if self.failed.as_ref().is_none_or(|(earlier, _)| place < *earlier) {
            self.failed = Some((place, error));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Visits each member's update with its place among the members, in no order. On an error some were not visited.
pub(super) fn each<E: Send>(
    members: &[Member],
    threads: usize,
    read: impl FnMut(&DeviceId) -> Result<Vec<u8>, E> + Send,
    decode: impl Fn(&[u8]) -> Result<AdapterDelta, DecodeError> + Sync,
    visit: impl Fn(usize, AdapterDelta) -> Result<(), CandidateError<E>> + Sync,
) -> Result<(), CandidateError<E>> {
    let queue = Mutex::new(Queue { members: members.iter().enumerate(), read, failed: None });
    let work = || {
        loop {
            let Some((place, device, bytes)) = lock(&queue).next() else { return };
            let decoded = decode(&bytes).map_err(|source| CandidateError::Decode { device, source });
            drop(bytes);
            if let Err(error) = decoded.and_then(|delta| visit(place, delta)) {
                lock(&queue).fail(place, error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(members.len()) {
            scope.spawn(work);
        }
        work();
    });
    match queue.into_inner().unwrap_or_else(PoisonError::into_inner).failed {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use commonweal_adapter::{AdapterLayout, Module, Target, Trainable};
    use commonweal_protocol::DeviceReport;

    use super::*;

    fn members(count: u8) -> Vec<Member> {
        (0..count)
            .map(|number| Member {
                device: DeviceId([number; 16]),
                samples: 1,
                length: 1,
                report: DeviceReport::default(),
                norm: None,
                staleness: 0,
            })
            .collect()
    }

    /// A delta whose values are the first byte.
    fn decode(bytes: &[u8]) -> Result<AdapterDelta, DecodeError> {
        let modules = vec![Module { target: Target::Q, inputs: 2, outputs: 2 }];
        let layout = Arc::new(AdapterLayout::new(1, 1, 1.0, modules).unwrap());
        let number = *bytes.first().ok_or(DecodeError::Version { got: None })?;
        Ok(AdapterDelta::from_values(layout, Trainable::Both, vec![f32::from(number); 4]).unwrap())
    }

    #[test]
    fn every_member_is_visited_once_with_its_own_update() {
        for threads in [1, 2, 5, 40] {
            let seen = Mutex::new(BTreeSet::new());
            let read = |device: &DeviceId| Ok::<_, std::convert::Infallible>(vec![device.0[0]]);
            let visit = |place: usize, delta: AdapterDelta| {
                assert_eq!(delta.values()[0] as usize, place);
                assert!(lock(&seen).insert(place), "{place} twice");
                Ok(())
            };
            each(&members(30), threads, read, decode, visit).unwrap();
            assert_eq!(lock(&seen).len(), 30);
        }
    }

    #[test]
    fn nothing_is_read_after_a_failure_and_the_first_one_is_told() {
        for threads in [1, 4] {
            let mut reads = 0;
            let read = |device: &DeviceId| {
                reads += 1;
                if device.0[0] < 11 { Ok(vec![1]) } else { Err(format!("no {device}")) }
            };
            let error = each(&members(30), threads, read, decode, |_, _| Ok(())).unwrap_err();
            assert!(matches!(&error, CandidateError::Read { device, .. } if device.0[0] == 11), "{error:?}");
            assert_eq!(reads, 12);

            // Two that do not decode: the later one may be met first, the earlier one is told.
            let read = |device: &DeviceId| {
                Ok::<_, String>(if matches!(device.0[0], 11 | 12) { vec![] } else { vec![1] })
            };
            let error = each(&members(30), threads, read, decode, |_, _| Ok(())).unwrap_err();
            assert!(
                matches!(&error, CandidateError::Decode { device, .. } if device.0[0] == 11),
                "{error:?}"
            );
        }
    }
}

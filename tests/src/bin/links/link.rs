//! A link in user space: packets go through it at its rate, are late by its delay, wait in its buffer and are dropped when
//! that is full, and some are lost. Each direction has its own. A device that comes from another address gets another
//! path, as behind a router that translates addresses.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::{net::UdpSocket, sync::mpsc, task::JoinHandle, time::Instant};

/// Longest packet.
const PACKET_BYTES_MAX: usize = 65_535;
/// Packets on the way in one direction: far more than any delay holds at any rate here.
const UNDER_WAY_MAX: usize = 1 << 16;

/// What a link is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) bits_per_second: f64,
    /// One way.
    pub(super) delay: Duration,
    /// How long a packet may wait before it is sent.
    pub(super) buffer: Duration,
    /// Share of the packets that are lost, in each direction.
    pub(super) loss: f64,
}

impl Default for Shape {
    /// As good as no link at all.
    fn default() -> Self {
        let buffer = Duration::from_secs(1);
        Self { bits_per_second: 1e10, delay: Duration::ZERO, buffer, loss: 0.0 }
    }
}

/// A link between one device and an aggregator.
pub(super) struct Link {
    shared: Arc<Shared>,
    address: SocketAddr,
    carrying: JoinHandle<()>,
}

struct Shared {
    near: UdpSocket,
    server: SocketAddr,
    up: Mutex<Direction>,
    down: Mutex<Direction>,
    /// By the device's address.
    paths: Mutex<BTreeMap<SocketAddr, Path>>,
    bytes_from_device: AtomicU64,
}

/// One way.
struct Direction {
    shape: Shape,
    /// When the last packet that was taken will have been sent.
    busy_until: Instant,
    random: ChaCha8Rng,
}

/// Where a device's packets come out.
struct Path {
    going_up: mpsc::Sender<(Instant, Vec<u8>)>,
    tasks: [JoinHandle<()>; 3],
}

impl Drop for Path {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.carrying.abort();
        self.shared.paths().clear();
    }
}

impl Link {
    /// A link without any effect, to an aggregator.
    pub(super) async fn between(server: SocketAddr, seed: u64) -> io::Result<Self> {
        let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = near.local_addr()?;
        let direction = |stream| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(stream);
            Mutex::new(Direction { shape: Shape::default(), busy_until: Instant::now(), random })
        };
        let shared = Arc::new(Shared {
            near,
            server,
            up: direction(0),
            down: direction(1),
            paths: Mutex::default(),
            bytes_from_device: AtomicU64::new(0),
        });
        let carrying = tokio::spawn(carry(shared.clone()));
        Ok(Self { shared, address, carrying })
    }

    /// Where the device finds the aggregator.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes it from now on.
    pub(super) fn become_of(&self, shape: Shape) {
        for direction in [&self.shared.up, &self.shared.down] {
            lock(direction).shape = shape;
        }
    }

    /// Loses what is on the way, and whatever still comes by the device's address of until now.
    pub(super) fn lose_path(&self) {
        self.shared.paths().clear();
    }

    /// Bytes of all packets that came from the device so far, those included that were then lost.
    pub(super) fn bytes_from_device(&self) -> u64 {
        self.shared.bytes_from_device.load(Ordering::Relaxed)
    }
}

impl Direction {
    /// When a packet arrives; never if it is lost.
    fn take(&mut self, length: usize, now: Instant) -> Option<Instant> {
        let Shape { bits_per_second, delay, buffer, loss } = self.shape;
        let begins = self.busy_until.max(now);
        if begins - now > buffer {
            return None;
        }
        self.busy_until = begins + Duration::from_secs_f64(length as f64 * 8.0 / bits_per_second);
        let is_lost = self.random.random_bool(loss);
        (!is_lost).then(|| self.busy_until + delay)
    }
}

impl Shared {
    fn paths(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, Path>> {
        lock(&self.paths)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes what comes from the device.
async fn carry(shared: Arc<Shared>) {
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    loop {
        let Ok((length, device)) = shared.near.recv_from(&mut buffer).await else { continue };
        shared.bytes_from_device.fetch_add(length as u64, Ordering::Relaxed);
        let arrives = lock(&shared.up).take(length, Instant::now());
        if !shared.paths().contains_key(&device) {
            let Ok(path) = open(&shared, device).await else { continue };
            shared.paths().insert(device, path);
        }
        if let (Some(arrives), Some(path)) = (arrives, shared.paths().get(&device)) {
            // A full queue drops the packet, as a buffer does.
            drop(path.going_up.try_send((arrives, buffer[..length].to_vec())));
        }
    }
}

/// A new address towards the aggregator, for a new one of the device.
async fn open(shared: &Arc<Shared>, device: SocketAddr) -> io::Result<Path> {
    let far = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
    let (going_up, mut upwards) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY_MAX);
    let (going_down, mut downwards) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY_MAX);
    let sending = {
        let (far, server) = (far.clone(), shared.server);
        tokio::spawn(async move {
            while let Some((arrives, packet)) = upwards.recv().await {
                tokio::time::sleep_until(arrives).await;
                drop(far.send_to(&packet, server).await);
            }
        })
    };
    let receiving = {
        let shared = shared.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; PACKET_BYTES_MAX];
            loop {
                let Ok((length, _)) = far.recv_from(&mut buffer).await else { continue };
                if let Some(arrives) = lock(&shared.down).take(length, Instant::now()) {
                    drop(going_down.try_send((arrives, buffer[..length].to_vec())));
                }
            }
        })
    };
    let answering = {
        let shared = shared.clone();
        tokio::spawn(async move {
            while let Some((arrives, packet)) = downwards.recv().await {
                tokio::time::sleep_until(arrives).await;
                drop(shared.near.send_to(&packet, device).await);
            }
        })
    };
    Ok(Path { going_up, tasks: [sending, receiving, answering] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direction(shape: Shape) -> Direction {
        Direction { shape, busy_until: Instant::now(), random: ChaCha8Rng::seed_from_u64(0) }
    }

    #[test]
    fn packets_take_their_time_and_fill_the_buffer() {
        let now = Instant::now();
        let (delay, buffer) = (Duration::from_millis(25), Duration::from_millis(10));
        let mut link = direction(Shape { bits_per_second: 8e6, delay, buffer, loss: 0.0 });
        link.busy_until = now;
        // A thousand bytes are a millisecond.
        for number in 1..=11 {
            assert_eq!(link.take(1_000, now), Some(now + delay + Duration::from_millis(number)));
        }
        assert_eq!(link.take(1_000, now), None, "the buffer is full");
        assert!(link.take(1_000, now + Duration::from_millis(2)).is_some());
    }

    #[test]
    fn the_wanted_share_is_lost() {
        let mut link = direction(Shape { loss: 0.05, ..Shape::default() });
        let lost = (0..20_000).filter(|_| link.take(100, Instant::now()).is_none()).count();
        assert!((800..1_200).contains(&lost), "expected 1,000, got {lost}");
    }
}

//! A short, deterministic stand-in for libFuzzer, for the ordinary tests of any crate:
//! `#[path = "../../../fuzz/mutate.rs"] mod mutate;`.

use std::path::Path;

/// Calls `target` with every seed in the folder `seeds/<name>` beside this file, then with `count` mutations of
/// them, the same on every run.
///
/// # Panics
/// If the folder holds no seeds, or if `target` panics: then the input is printed too.
pub(crate) fn run(name: &str, count: u64, target: impl Fn(&[u8])) {
    // The including crate's, somewhere below the repository's root.
    let crates = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seeds = crates.ancestors().map(|above| above.join("fuzz/seeds")).find(|seeds| seeds.is_dir());
    let folder = seeds.unwrap_or_else(|| panic!("no fuzz/seeds above {}", crates.display())).join(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let seeds: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(!seeds.is_empty(), "no seeds in {}", folder.display());
    for seed in &seeds {
        call(&target, seed);
    }
    let mut random = Random(count);
    for _ in 0..count {
        let mut bytes = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(4) {
            mutate(&mut bytes, &seeds, &mut random);
        }
        call(&target, &bytes);
    }
}

/// Prints the input if the target panics.
fn call(target: &impl Fn(&[u8]), bytes: &[u8]) {
    struct Shown<'b>(&'b [u8]);
    impl Drop for Shown<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failing input: {:02x?}", self.0);
            }
        }
    }
    let _shown = Shown(bytes);
    target(bytes);
}

fn mutate(bytes: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let place = random.below(bytes.len() + 1);
    match random.below(7) {
        0 => bytes.truncate(place),
        1 => bytes.insert(place, random.next() as u8),
        2 => {
            let other = &seeds[random.below(seeds.len())];
            bytes.splice(place.., other[random.below(other.len() + 1)..].iter().copied());
        }
        kind => {
            let Some(byte) = bytes.get_mut(place) else { return };
            match kind {
                3 => *byte ^= 1 << random.below(8),
                4 => *byte = random.next() as u8,
                5 => *byte = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                _ => {
                    bytes.remove(place);
                }
            }
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

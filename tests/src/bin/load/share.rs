//! A share of a core for a process: with `--front-cores` each front has no more than that, as on a small machine of its
//! own, so that fronts are what gives way first. Of `site.rs`; by Linux's control groups, of either version, as root.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// Microseconds in which a process has its share once.
const PERIOD_US: u32 = 20_000;

/// A control group of one process; it goes with this, when the process has ended.
#[derive(Debug)]
pub(super) struct Share {
    folder: PathBuf,
}

impl Share {
    /// Bounds a process and all its threads.
    pub(super) fn of(process: u32, cores: f64) -> Result<Self> {
        let quota_us = (cores * f64::from(PERIOD_US)) as u32;
        let unified = Path::new("/sys/fs/cgroup");
        let (parent, limits) = if unified.join("cgroup.controllers").is_file() {
            write(&unified.join("cgroup.subtree_control"), "+cpu")?;
            (unified.to_owned(), vec![("cpu.max", format!("{quota_us} {PERIOD_US}"))])
        } else if unified.join("cpu/cpu.cfs_quota_us").is_file() || unified.join("cpu/cgroup.procs").is_file()
        {
            let limits = vec![
                ("cpu.cfs_period_us", PERIOD_US.to_string()),
                ("cpu.cfs_quota_us", quota_us.to_string()),
            ];
            (unified.join("cpu"), limits)
        } else {
            bail!("--front-cores: expected control groups of processors below {}", unified.display());
        };
        let share = Self { folder: parent.join(format!("commonweal-load-{process}")) };
        fs::create_dir(&share.folder).with_context(|| {
            format!("--front-cores: {}: a control group needs root", share.folder.display())
        })?;
        for (name, limit) in limits {
            write(&share.folder.join(name), &limit)?;
        }
        write(&share.folder.join("cgroup.procs"), &process.to_string())?;
        Ok(share)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.folder) {
            eprintln!("{} is left over: {error}", self.folder.display());
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("--front-cores: {}", path.display()))
}

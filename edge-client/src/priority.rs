//! Asks for less than others of the processors and the disk, so that a round is felt least.
//!
//! Called once by `run` before it starts a thread: on Linux both are a thread's own, and those that it starts inherit them.

use std::io;

/// Of `ioprio_set(2)`: this thread, and the class that gets the disk when nobody else wants it.
#[cfg(target_os = "linux")]
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
#[cfg(target_os = "linux")]
const IOPRIO_IDLE: libc::c_int = 3 << 13;

/// Sets niceness and the idle class of disk access for this thread and all that it starts.
#[cfg(target_os = "linux")]
pub fn lower(nice: u8) -> io::Result<()> {
    // SAFETY: both calls take numbers and touch no memory of ours; 0 is the calling thread.
    #[expect(unsafe_code, reason = "the standard library has neither call")]
    let set = unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, libc::c_int::from(nice)) == 0
            && libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE) == 0
    };
    if set { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Nothing, where there is no such thing or nobody has tried it.
#[cfg(not(target_os = "linux"))]
pub fn lower(_: u8) -> io::Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// On a thread of its own, so that the other tests keep theirs.
    #[test]
    fn a_thread_and_those_that_it_starts_ask_for_less() {
        let nice = || {
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            // Behind the name, which may hold anything but ends with the last parenthesis, niceness is the 17th.
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(16).unwrap().parse::<i32>().unwrap()
        };
        #[expect(unsafe_code, reason = "the standard library has no such call")]
        // SAFETY: the call takes two numbers and touches no memory of ours.
        let class = || unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0) } >> 13;
        let before = nice();
        let lowered = std::thread::spawn(move || {
            lower(19).unwrap();
            std::thread::spawn(move || (nice(), class())).join().unwrap()
        });
        assert_eq!(lowered.join().unwrap(), (19, 3));
        assert_eq!(nice(), before);
    }
}

//! In which order the kernel gives threads their turn when there are more than cores.
//!
//! Called by a thread for itself. What was tried, and slowed what it was for, is in docs/performance.md: a
//! higher nice value for those who build CPs. They hold locks that others wait for.

use std::io;

use thread_priority::{
    Error, RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

/// Goes before every thread of an ordinary class: SCHED_RR, the lowest priority of it (sched(7)).
///
/// # Errors
/// Without CAP_SYS_NICE or a limit RLIMIT_RTPRIO of at least 1; where the kernel gives control groups no
/// real-time share.
pub fn go_first() -> io::Result<()> {
    let policy = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::RoundRobin);
    let done = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy);
    done.map_err(|error| match error {
        Error::OS(code) => io::Error::from_raw_os_error(code),
        other @ (Error::Priority(_) | Error::PriorityNotInRange(_) | Error::Ffi(_)) => {
            io::Error::other(other)
        }
    })
}

/// Goes behind the ordinary threads of this process that want the same core: nice 10 (sched(7)).
///
/// # Errors
/// None that is known: this needs no right.
pub fn go_behind() -> io::Result<()> {
    // On Linux it is that of the calling thread alone.
    rustix::process::nice(BEHIND)?;
    Ok(())
}

/// A tenth of the weight of an ordinary thread.
const BEHIND: i32 = 10;

#[cfg(test)]
mod tests {
    use thread_priority::thread_schedule_policy;

    use super::*;

    /// One thread goes behind, and no other.
    #[test]
    fn a_thread_goes_behind_alone() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let behind = std::thread::spawn(move || {
            go_behind().unwrap();
            nice()
        });
        assert_eq!(behind.join().unwrap(), (before + BEHIND).min(19));
        assert_eq!(nice(), before);
    }

    /// It is done or refused, and the class is as it says.
    #[test]
    fn a_thread_goes_first_or_hears_why_not() {
        let went = std::thread::spawn(|| (go_first(), thread_schedule_policy().unwrap()));
        let (done, class) = went.join().unwrap();
        let round_robin = RealtimeThreadSchedulePolicy::RoundRobin;
        let is_first = class == ThreadSchedulePolicy::Realtime(round_robin);
        assert_eq!(done.is_ok(), is_first, "{done:?} {class:?}");
        if let Err(error) = done {
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        }
    }
}

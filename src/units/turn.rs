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

#[cfg(test)]
mod tests {
    use thread_priority::thread_schedule_policy;

    use super::*;

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

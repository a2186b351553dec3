//! In which order the kernel gives threads their turn when there are more than cores.
//!
//! A write waits for a few threads; what is built behind it waits for nobody's answer. Each function is
//! called by a thread for itself.

use std::io;

use thread_priority::{
    Error, RealtimeThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

/// Nice value of what nobody waits for: a tenth of the share of a thread that somebody waits for.
const BEHIND: i32 = 10;

/// Lets others go first: for builders of CPs, scrubs, rebuilds. A refusal changes nothing but the
/// order.
pub fn step_back() {
    if let Err(error) = rustix::process::setpriority_process(None, BEHIND) {
        tracing::debug!(%error, "a thread in the background stays in its class");
    }
}

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

    /// Of this thread, not of the process.
    #[test]
    fn a_thread_steps_back_alone() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let behind = std::thread::spawn(move || {
            step_back();
            nice()
        });
        assert_eq!((behind.join().unwrap(), nice()), (BEHIND.max(before), before));
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

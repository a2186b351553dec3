//! What a running process says about its configuration files: what is wrong in them, and what of
//! them waits for a restart.

use serde::{Deserialize, Serialize};

use super::health::{HealthReason, HealthWord};

/// What is met of a file that stays open for writing.
pub const STILL_WRITTEN: &str =
    "somebody has had it open for writing for more than 5 s, and it is not read until it is closed";

/// Something that is wrong in a file: nothing of that file was taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigProblem {
    /// The file.
    pub file: String,
    /// Line, from 1; null if it is about the file as a whole.
    pub line: Option<u64>,
    /// The key in full; empty if there is none.
    pub key: String,
    /// What was met.
    pub met: String,
    /// What to write instead.
    pub fix: String,
}

/// One key whose value in the file is not the one that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigChange {
    /// The key in full.
    pub key: String,
    /// What runs; empty if nothing does.
    pub from: String,
    /// What the file says; empty if it says nothing.
    pub to: String,
    /// `now`, `next-cp`, `next-session` or `restart`.
    pub when: String,
}

/// Files against what runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ConfigStatus {
    /// What was refused; what ran before goes on.
    pub problems: Vec<ConfigProblem>,
    /// What only a restart takes over.
    pub needs_restart: Vec<ConfigChange>,
}

impl ConfigStatus {
    /// Whether everything in the files runs.
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty() && self.needs_restart.is_empty()
    }

    /// Why somebody should look at the files.
    pub fn reasons(&self) -> Vec<HealthReason> {
        let mut reasons: Vec<HealthReason> = self
            .problems
            .iter()
            .map(|problem| {
                let line = problem.line.map(|line| format!(":{line}")).unwrap_or_default();
                let key = if problem.key.is_empty() { "" } else { ": " };
                HealthReason {
                    code: "config-refused".into(),
                    word: HealthWord::Warning,
                    object: problem.file.clone(),
                    text: format!(
                        "{}{line}{key}{}: {}; what ran before goes on",
                        problem.file, problem.key, problem.met
                    ),
                    next_step: problem.fix.clone(),
                }
            })
            .collect();
        if !self.needs_restart.is_empty() {
            let keys: Vec<&str> = self.needs_restart.iter().map(|one| one.key.as_str()).collect();
            reasons.push(HealthReason {
                code: "restart-needed".into(),
                word: HealthWord::Warning,
                object: "config".into(),
                text: format!("the file has other values than run for {}", keys.join(", ")),
                next_step: "restart this process, or write the values that run".into(),
            });
        }
        reasons
    }
}

/// What a reload would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigDiffAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// What differs.
    pub changes: Vec<ConfigChange>,
    /// What would be refused.
    pub problems: Vec<ConfigProblem>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_is_a_reason_and_all_restarts_are_one() {
        assert!(ConfigStatus::default().is_empty() && ConfigStatus::default().reasons().is_empty());
        let problem = |line, key: &str| ConfigProblem {
            file: "sources.d/a.toml".into(),
            line,
            key: key.into(),
            met: "\"x\" is no size".into(),
            fix: "write \"1GiB\"".into(),
        };
        let change = |key: &str| ConfigChange {
            key: key.into(),
            from: "1".into(),
            to: "2".into(),
            when: "restart".into(),
        };
        let status = ConfigStatus {
            problems: vec![problem(Some(3), "log_limit"), problem(None, "")],
            needs_restart: vec![change("listen"), change("nvram.size")],
        };
        let reasons = status.reasons();
        let texts: Vec<&str> = reasons.iter().map(|reason| reason.text.as_str()).collect();
        assert_eq!(
            texts,
            [
                "sources.d/a.toml:3: log_limit: \"x\" is no size; what ran before goes on",
                "sources.d/a.toml: \"x\" is no size; what ran before goes on",
                "the file has other values than run for listen, nvram.size",
            ]
        );
        assert_eq!(reasons[0].next_step, "write \"1GiB\"");
    }
}

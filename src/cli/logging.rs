//! The log of a long-running command, on stderr.
//!
//! Level and filter come from `MIRRORHUB_LOG` (as tracing's `EnvFilter` reads it; default `info`).
//! On a terminal in colours; under journald with the priority in front and without a time, which
//! the journal has itself; `MIRRORHUB_LOG_FORMAT=json` gives one JSON object a line.

use std::fmt;
use std::io::IsTerminal;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::TryInitError;

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For a person, with colours or without.
    Text {
        /// Whether in colours.
        colour: bool,
    },
    /// For journald: `<6>message`, no time.
    Journal,
    /// One JSON object a line.
    Json,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// `MIRRORHUB_LOG` says what nobody understands.
    #[error("MIRRORHUB_LOG={0:?} is no filter: {1}")]
    Filter(String, ParseError),
    /// `MIRRORHUB_LOG_FORMAT` names no format.
    #[error("MIRRORHUB_LOG_FORMAT={0:?} is no format: wanted text, journal or json")]
    Format(String),
    /// There is one already.
    #[error("the log is set up already: {0}")]
    Twice(#[from] TryInitError),
}

impl LogFormat {
    /// What the environment asks for.
    pub fn of_process() -> Result<Self, LogError> {
        let variable = |name: &str| std::env::var(name).ok();
        Self::of(std::io::stderr().is_terminal(), &variable)
    }

    fn of(tty: bool, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, LogError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = Self::Text { colour: tty && set("NO_COLOR").is_none() };
        match set("MIRRORHUB_LOG_FORMAT").as_deref() {
            Some("text") => Ok(text),
            Some("journal") => Ok(Self::Journal),
            Some("json") => Ok(Self::Json),
            Some(other) => Err(LogError::Format(other.to_owned())),
            // systemd sets it for processes whose stderr is the journal.
            None if !tty && set("JOURNAL_STREAM").is_some() => Ok(Self::Journal),
            None => Ok(text),
        }
    }
}

/// Sets the log up for the whole process. Called once, first thing.
pub fn install(format: LogFormat) -> Result<(), LogError> {
    use tracing_subscriber::util::SubscriberInitExt;
    let wanted = std::env::var("MIRRORHUB_LOG").unwrap_or_default();
    let wanted = if wanted.is_empty() { "info".to_owned() } else { wanted };
    let filter = EnvFilter::try_new(&wanted).map_err(|error| LogError::Filter(wanted, error))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text { colour } => builder.with_ansi(colour).finish().try_init()?,
        LogFormat::Journal => {
            builder.with_ansi(false).event_format(JournalLines).finish().try_init()?;
        }
        LogFormat::Json => builder.json().finish().try_init()?,
    }
    Ok(())
}

/// `<N>target: message fields`, as sd-daemon(3) reads it.
#[derive(Debug)]
struct JournalLines;

impl<S, N> FormatEvent<S, N> for JournalLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>{}: ", priority(*event.metadata().level()), event.metadata().target())?;
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Priorities of syslog(3): err, warning, info, debug.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    fn format(tty: bool, variables: &[(&str, &str)]) -> Result<LogFormat, LogError> {
        LogFormat::of(tty, &|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_format_follows_the_environment() {
        let text = |colour| LogFormat::Text { colour };
        assert_eq!(format(true, &[]).unwrap(), text(true));
        assert_eq!(format(true, &[("NO_COLOR", "1")]).unwrap(), text(false));
        assert_eq!(format(false, &[]).unwrap(), text(false));
        assert_eq!(format(false, &[("JOURNAL_STREAM", "8:1")]).unwrap(), LogFormat::Journal);
        assert_eq!(format(true, &[("JOURNAL_STREAM", "8:1")]).unwrap(), text(true));
        assert_eq!(format(true, &[("MIRRORHUB_LOG_FORMAT", "json")]).unwrap(), LogFormat::Json);
        assert!(format(true, &[("MIRRORHUB_LOG_FORMAT", "xml")]).is_err());
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn journal_lines_begin_with_their_priority() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .event_format(JournalLines)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(target: "hub", source = "filer-a", "log failed");
            tracing::error!(target: "hub", "gone");
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "<4>hub: log failed source=\"filer-a\"\n<3>hub: gone\n");
    }
}

//! What stdout and stderr are: colours, width and letters that can be used there.

use std::io::IsTerminal;

/// What one stream can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Whether a person looks at it right now.
    pub tty: bool,
    /// Whether to use colours.
    pub colour: bool,
    /// Whether letters beyond ASCII can be shown.
    pub unicode: bool,
    /// Columns, if known.
    pub width: Option<u16>,
}

/// Both streams of the process.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// stdout.
    pub out: Look,
    /// stderr.
    pub error: Look,
}

impl Look {
    /// A plain stream without bounds: a file or a pipe.
    pub const PLAIN: Self = Self { tty: false, colour: false, unicode: true, width: None };

    /// Decides from what the environment says. Colours only on a terminal, and not with `NO_COLOR`
    /// (no-color.org: present and not empty) or a dumb terminal.
    fn of(tty: bool, width: Option<u16>, variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let dumb = set("TERM").is_some_and(|term| term == "dumb");
        let colour = tty && !dumb && set("NO_COLOR").is_none();
        // The first of these that is set is the locale, as setlocale(3) takes it.
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default();
        let utf8 = locale.to_ascii_lowercase().replace('-', "").contains("utf8");
        let width = width.filter(|_| tty);
        Self { tty, colour, unicode: utf8 || !tty, width }
    }
}

impl Terminal {
    /// The streams of this process.
    pub fn of_process() -> Self {
        let variable = |name: &str| std::env::var(name).ok();
        let width = comfy_table::Table::new().width();
        Self {
            out: Look::of(std::io::stdout().is_terminal(), width, &variable),
            error: Look::of(std::io::stderr().is_terminal(), None, &variable),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(tty: bool, variables: &[(&str, &str)]) -> Look {
        Look::of(tty, Some(80), &|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn colours_only_on_a_terminal_that_wants_them() {
        assert!(look(true, &[("TERM", "xterm")]).colour);
        assert!(!look(false, &[("TERM", "xterm")]).colour);
        assert!(!look(true, &[("NO_COLOR", "1")]).colour);
        assert!(look(true, &[("NO_COLOR", "")]).colour, "an empty NO_COLOR does not count");
        assert!(!look(true, &[("TERM", "dumb")]).colour);
        assert_eq!(look(false, &[]).width, None);
    }

    #[test]
    fn letters_beyond_ascii_where_the_locale_has_them() {
        assert!(look(true, &[("LANG", "de_DE.UTF-8")]).unicode);
        assert!(!look(true, &[("LANG", "C")]).unicode);
        assert!(!look(true, &[("LC_ALL", "C"), ("LANG", "de_DE.UTF-8")]).unicode);
        assert!(look(true, &[("LC_ALL", ""), ("LANG", "C.utf8")]).unicode);
        assert!(look(false, &[("LANG", "C")]).unicode, "a file takes UTF-8");
    }
}

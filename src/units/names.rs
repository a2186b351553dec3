//! Names of sources, volumes and kept CPs: 1 to 63 of `a-z 0-9 . _ -`, first and last a letter or
//! digit. `/` and `@` only separate, so no name can walk out of a directory or into another name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The longest name in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty, or longer than 63 bytes.
    #[error("a name has 1 to 63 characters, this one has {0}")]
    Length(usize),
    /// A character outside the set.
    #[error("a name is made of a-z 0-9 . _ -, not {0:?}")]
    Character(char),
    /// First or last is punctuation.
    #[error("a name begins and ends with a letter or digit")]
    Ends,
}

fn check(text: &str) -> Result<(), NameError> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX {
        return Err(NameError::Length(text.chars().count()));
    }
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if let Some(bad) = text.chars().find(|&c| !inner(c) && !matches!(c, '.' | '_' | '-')) {
        return Err(NameError::Character(bad));
    }
    if text.starts_with(inner) && text.ends_with(inner) { Ok(()) } else { Err(NameError::Ends) }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Box<str>);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check(text).map(|()| Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

name_type!(
    /// Name of a source.
    SourceName);
name_type!(
    /// Name of a volume within its source.
    VolumeName);
name_type!(
    /// Name of a kept CP.
    KeptName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_held_to_their_alphabet() {
        for good in ["a", "filer-a", "vol0", "a.b_c-d", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<SourceName>().unwrap().as_str(), good);
        }
        assert_eq!("".parse::<SourceName>(), Err(NameError::Length(0)));
        assert_eq!("x".repeat(64).parse::<SourceName>(), Err(NameError::Length(64)));
        assert_eq!("Filer".parse::<SourceName>(), Err(NameError::Character('F')));
        assert_eq!("a/b".parse::<VolumeName>(), Err(NameError::Character('/')));
        assert_eq!("a@b".parse::<VolumeName>(), Err(NameError::Character('@')));
        for ends in [".a", "a.", "-", ".."] {
            assert_eq!(ends.parse::<KeptName>(), Err(NameError::Ends));
        }
    }

    #[test]
    fn a_bad_name_does_not_come_in_through_serde() {
        assert!(serde_json::from_str::<SourceName>("\"../etc\"").is_err());
    }
}

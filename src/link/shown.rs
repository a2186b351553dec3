//! What a peer shows of itself: its certificate, as far as this program judges it.
//!
//! The library checks the chain in a whole handshake; in a resumed one it takes the certificate as it was.
//! So the end of it is asked here, by whoever accepts a connection, in either case.

use std::fmt;
use std::str::FromStr;

use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::units::machine;
use crate::units::times::time_of_day;

/// SHA-256 of a certificate (DER), as `openssl x509 -noout -fingerprint -sha256` shows it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut digest = [0; 32];
        let suite = TLS13_AES_128_GCM_SHA256.tls13().map(|suite| suite.common.hash_provider);
        let hash = suite.map(|hash| hash.hash(bytes));
        let hash = hash.as_ref().map_or(&[][..], AsRef::as_ref);
        assert_eq!(hash.len(), digest.len(), "the hash of that suite is SHA-256");
        digest.copy_from_slice(hash);
        Self(digest)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no SHA-256 of a certificate: that has 64 hexadecimal digits")]
pub struct NoFingerprint;

impl FromStr for Fingerprint {
    type Err = NoFingerprint;

    /// Digits of either case, with or without colons between bytes.
    fn from_str(text: &str) -> Result<Self, NoFingerprint> {
        let mut digits = text.chars().filter(|c| *c != ':').map(|c| c.to_digit(16));
        let mut digest = [0_u8; 32];
        for byte in &mut digest {
            let (Some(Some(high)), Some(Some(low))) = (digits.next(), digits.next()) else {
                return Err(NoFingerprint);
            };
            *byte = u8::try_from(high * 16 + low).map_err(|_| NoFingerprint)?;
        }
        if digits.next().is_some() { Err(NoFingerprint) } else { Ok(Self(digest)) }
    }
}

/// What a peer has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The DNS names: those of the sources that may come with it.
    pub names: Vec<String>,
    /// Which certificate it is.
    pub fingerprint: Fingerprint,
    /// When it begins, in seconds since 1970.
    pub begins: i64,
    /// When it ends.
    pub ends: i64,
}

impl Shown {
    /// Of that certificate, or why it cannot be read.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, read) =
            X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
        let (from, to) = (read.validity().not_before, read.validity().not_after);
        let (begins, ends) = (from.timestamp(), to.timestamp());
        let fingerprint = Fingerprint::of(certificate);
        Ok(Self { names: names_in(&read), fingerprint, begins, ends })
    }

    /// Whether its time is not over yet.
    ///
    /// # Errors
    /// When it ended, in the words of a handshake that fails for it.
    pub fn in_time(&self) -> Result<(), String> {
        if self.ends < machine::unix_seconds() {
            return Err(format!("the certificate shown expired at {}", time_of_day(self.ends)));
        }
        Ok(())
    }
}

/// The names of sources in a certificate.
fn names_in(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let dns = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::OtherName(..)
        | GeneralName::RFC822Name(_)
        | GeneralName::X400Address(_)
        | GeneralName::DirectoryName(_)
        | GeneralName::EDIPartyName(_)
        | GeneralName::URI(_)
        | GeneralName::IPAddress(_)
        | GeneralName::RegisteredID(_)
        | GeneralName::Invalid(..) => None,
    };
    names.value.general_names.iter().filter_map(dns).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answer: SHA-256 of nothing and of "abc".
    #[test]
    fn a_fingerprint_is_sha_256_and_reads_back() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let abc = "BA:78:16:BF:8F:01:CF:EA:41:41:40:DE:5D:AE:22:23:B0:03:61:A3:96:17:7A:9C:B4:10:\
                   FF:61:F2:00:15:AD";
        assert_eq!(Fingerprint::of(b"").to_string(), empty);
        assert_eq!(abc.parse(), Ok(Fingerprint::of(b"abc")));
        for bad in ["", "e3", &empty[1..], &format!("{empty}0"), &empty.replace('e', "x")] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(NoFingerprint), "{bad}");
        }
    }
}

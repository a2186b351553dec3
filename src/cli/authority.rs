//! The hub's own small authority: a key and a certificate in a directory of its state.
//!
//! Made at the hub's first start with `[tls]`, used by that process for the hub's certificate and by
//! `mirrorhub onboard` for those of sources. Keys are readable by their owner alone. The authority's
//! certificate is what both ends trust, so its key is as precious as the images: whoever has it can
//! come as any source. Files: `ca-key.pem`, `ca-cert.pem`, `server-key.pem`, `server-cert.pem`.
//!
//! Written key first, each file whole and durable under its name or not at all; a cut is made good by
//! the next start. A certificate without its key is an error: to make another authority would shut
//! out every source.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::new_file::{replace, write_new};
use crate::device::directory::create_durably;
use crate::link::shown::{Fingerprint, Shown};
use crate::units::machine;

const DAY_SECONDS: i64 = 86_400;
/// How long the authority lasts.
const AUTHORITY_DAYS: i64 = 20 * 365;
/// How long a certificate lasts that it signs.
const CERTIFICATE_DAYS: i64 = 2 * 365;
/// Time between two looks for an authority that is not made yet.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A clock that is behind by less than this does no harm.
const BEFORE_DAYS: i64 = 1;

/// Why there is no authority, or no certificate of it.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file.
    #[error("{}: {error}", .path.display())]
    File { path: PathBuf, error: io::Error },
    /// The key of a certificate is not there.
    #[error("{}: is missing, and {} is there", .key.display(), .cert.display())]
    KeyGone { key: PathBuf, cert: PathBuf },
    /// The library.
    #[error("{what}: {error}")]
    Make { what: String, error: rcgen::Error },
}

/// What a source is given.
#[derive(Debug, Clone)]
pub struct Issued {
    /// The authority's certificate.
    pub ca: String,
    /// The own one.
    pub cert: String,
    /// Its key.
    pub key: String,
    /// Which one it is.
    pub fingerprint: Fingerprint,
}

/// An authority in a directory.
#[derive(Debug)]
pub struct Authority<'a>(pub &'a Path);

impl Authority<'_> {
    /// Makes what is missing: the authority, and the hub's own certificate; that one anew as well when the
    /// last third of its time has begun. Its key stays, so that the two always go together.
    pub fn ensure(&self, hub_name: &str) -> Result<(), AuthorityError> {
        let directory = self.0;
        create_durably(directory)
            .map_err(|error| AuthorityError::File { path: directory.to_owned(), error })?;
        let (key, cert) = (self.path("ca-key.pem"), self.path("ca-cert.pem"));
        let pair = self.key(&key, &cert)?;
        if !is_there(&cert)? {
            let made = authority().self_signed(&pair).map_err(make("ca-cert.pem"))?;
            write(&cert, &made.pem(), 0o644)?;
        }
        let (key, cert) = (self.path("server-key.pem"), self.path("server-cert.pem"));
        let pair = self.key(&key, &cert)?;
        if !lasts(&cert)? {
            let purpose = ExtendedKeyUsagePurpose::ServerAuth;
            renew(&cert, &self.sign(hub_name, vec![dns(hub_name)?], purpose, &pair)?)?;
        }
        Ok(())
    }

    /// Waits until the hub has made the authority, as it does at its first start; `told` is called once if it is not
    /// there yet. Whether it is there within that time; an error if nobody may look.
    pub fn wait_made(
        &self,
        limit: Duration,
        told: impl FnOnce(&Path),
    ) -> Result<bool, AuthorityError> {
        let began = Instant::now();
        // Written last.
        let cert = self.path("ca-cert.pem");
        if is_there(&cert)? {
            return Ok(true);
        }
        told(self.0);
        // Nobody sends: between two looks at what another process makes.
        let (_keep, nobody) = mpsc::channel::<()>();
        while !is_there(&cert)? {
            if began.elapsed() >= limit {
                return Ok(false);
            }
            let _waited = nobody.recv_timeout(LOOK_EVERY);
        }
        Ok(true)
    }

    /// Makes what NBD and HTTP clients are shown, for these addresses, unless it is there and lasts.
    pub fn ensure_served(&self, hub_name: &str, at: &[IpAddr]) -> Result<(), AuthorityError> {
        let (key, cert) = (self.path("served-key.pem"), self.path("served-cert.pem"));
        let pair = self.key(&key, &cert)?;
        if lasts(&cert)? {
            return Ok(());
        }
        let mut names = vec![dns(hub_name)?, dns("localhost")?];
        names.extend(at.iter().filter(|at| !at.is_unspecified()).map(|at| SanType::IpAddress(*at)));
        let purpose = ExtendedKeyUsagePurpose::ServerAuth;
        renew(&cert, &self.sign(hub_name, names, purpose, &pair)?)
    }

    /// A certificate for a client of NBD and HTTP, or with `at` for a server of them that runs there.
    pub fn issue_for(&self, name: &str, at: &[String]) -> Result<Issued, AuthorityError> {
        let pair = KeyPair::generate().map_err(make(name))?;
        let mut names = Vec::new();
        for at in at {
            names.push(match at.parse() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => dns(at)?,
            });
        }
        // A client's has no DNS name in it: those are of sources.
        let purpose = if at.is_empty() {
            ExtendedKeyUsagePurpose::ClientAuth
        } else {
            ExtendedKeyUsagePurpose::ServerAuth
        };
        self.issued(self.sign(name, names, purpose, &pair)?, &pair)
    }

    /// A certificate for a source, with a new key that is kept nowhere here.
    pub fn issue(&self, name: &str) -> Result<Issued, AuthorityError> {
        let pair = KeyPair::generate().map_err(make(name))?;
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        self.issued(self.sign(name, vec![dns(name)?], purpose, &pair)?, &pair)
    }

    fn issued(&self, cert: String, pair: &KeyPair) -> Result<Issued, AuthorityError> {
        let ca = read(&self.path("ca-cert.pem"))?;
        // It was made here, a moment ago.
        let fingerprint = Fingerprint::of(&der(self.0, &cert)?);
        Ok(Issued { ca, cert, key: pair.serialize_pem(), fingerprint })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The key in that file; made, unless what it belongs to is there.
    fn key(&self, key: &Path, cert: &Path) -> Result<KeyPair, AuthorityError> {
        if is_there(key)? {
            return KeyPair::from_pem(&read(key)?).map_err(make(&key.display().to_string()));
        }
        if is_there(cert)? {
            return Err(AuthorityError::KeyGone { key: key.to_owned(), cert: cert.to_owned() });
        }
        let pair = KeyPair::generate().map_err(make(&key.display().to_string()))?;
        write(key, &pair.serialize_pem(), 0o600)?;
        Ok(pair)
    }

    fn sign(
        &self,
        name: &str,
        names: Vec<SanType>,
        purpose: ExtendedKeyUsagePurpose,
        pair: &KeyPair,
    ) -> Result<String, AuthorityError> {
        let (key, cert) = (self.path("ca-key.pem"), self.path("ca-cert.pem"));
        let issuer_key = KeyPair::from_pem(&read(&key)?).map_err(make("ca-key.pem"))?;
        let issuer = Issuer::from_ca_cert_pem(&read(&cert)?, issuer_key);
        let issuer = issuer.map_err(make("ca-cert.pem"))?;
        let mut params = lasting(CERTIFICATE_DAYS, name);
        params.subject_alt_names = names;
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(pair, &issuer).map_err(make(name))?.pem())
    }
}

fn dns(name: &str) -> Result<SanType, AuthorityError> {
    Ok(SanType::DnsName(name.try_into().map_err(make(name))?))
}

fn make(what: &str) -> impl FnOnce(rcgen::Error) -> AuthorityError {
    let what = what.to_owned();
    move |error| AuthorityError::Make { what, error }
}

fn authority() -> CertificateParams {
    let mut params = lasting(AUTHORITY_DAYS, "mirrorhub authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn lasting(days: i64, name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = machine::unix_seconds();
    params.not_before = time_of(now - BEFORE_DAYS * DAY_SECONDS);
    params.not_after = time_of(now + days * DAY_SECONDS);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

/// A day, as the library takes it.
fn time_of(seconds: i64) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

fn is_there(path: &Path) -> Result<bool, AuthorityError> {
    path.try_exists().map_err(|error| AuthorityError::File { path: path.to_owned(), error })
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|error| AuthorityError::File { path: path.to_owned(), error })
}

/// Whether it is there, its time has begun, and the last third of that has not.
fn lasts(cert: &Path) -> Result<bool, AuthorityError> {
    if !is_there(cert)? {
        return Ok(false);
    }
    let der = der(cert, &read(cert)?)?;
    let Shown { begins, ends, .. } = Shown::of(&der).map_err(|error| unread(cert, error))?;
    let now = machine::unix_seconds();
    let left = ends.saturating_sub(now);
    // Made while the clock was ahead, it is taken by nobody until then.
    Ok(begins <= now && left > ends.saturating_sub(begins) / 3)
}

/// The certificate in that text, which is of that place.
fn der(place: &Path, text: &str) -> Result<CertificateDer<'static>, AuthorityError> {
    let der = CertificateDer::from_pem_slice(text.as_bytes());
    der.map_err(|error| unread(place, error.to_string()))
}

fn unread(place: &Path, error: String) -> AuthorityError {
    let error = io::Error::new(io::ErrorKind::InvalidData, error);
    AuthorityError::File { path: place.to_owned(), error }
}

/// Puts a certificate of this hub there, over the one that ends.
fn renew(cert: &Path, text: &str) -> Result<(), AuthorityError> {
    replace(cert, text, 0o644)
        .map_err(|error| AuthorityError::File { path: cert.to_owned(), error })?;
    tracing::info!(file = %cert.display(), "certificate of this hub made");
    Ok(())
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    write_new(path, text, mode)
        .map_err(|error| AuthorityError::File { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_authority_is_made_once_and_its_keys_are_its_owners() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("tls");
        Authority(&base).ensure("hub").unwrap();
        let text = |name: &str| fs::read_to_string(base.join(name)).unwrap();
        let before = [text("ca-cert.pem"), text("server-cert.pem")];
        Authority(&base).ensure("hub").unwrap();
        assert_eq!([text("ca-cert.pem"), text("server-cert.pem")], before);
        for key in ["ca-key.pem", "server-key.pem"] {
            let mode = fs::metadata(base.join(key)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
        assert_eq!(fs::read_dir(&base).unwrap().count(), 4);
        // A cut before the certificate: it is made for the key that is there.
        fs::remove_file(base.join("server-cert.pem")).unwrap();
        Authority(&base).ensure("hub").unwrap();
        assert_ne!(text("server-cert.pem"), before[1]);
        // One whose last third has begun is made anew for the same key; one before it stays.
        let key = text("server-key.pem");
        for (days, stays) in [(250, true), (240, false), (-1, false)] {
            let pair = KeyPair::from_pem(&key).unwrap();
            let issuer = KeyPair::from_pem(&text("ca-key.pem")).unwrap();
            let issuer = Issuer::from_ca_cert_pem(&text("ca-cert.pem"), issuer).unwrap();
            let mut params = lasting(days, "hub");
            params.not_before = time_of(machine::unix_seconds() + (days - 730) * DAY_SECONDS);
            let old = params.signed_by(&pair, &issuer).unwrap().pem();
            fs::write(base.join("server-cert.pem"), &old).unwrap();
            Authority(&base).ensure("hub").unwrap();
            assert_eq!(text("server-cert.pem") == old, stays, "{days} days before its end");
            assert_eq!(text("server-key.pem"), key);
        }
        // Without its key nobody can tell whose certificate it is.
        fs::remove_file(base.join("ca-key.pem")).unwrap();
        let met = Authority(&base).ensure("hub").unwrap_err();
        assert!(matches!(met, AuthorityError::KeyGone { .. }), "{met}");
        assert_eq!(text("ca-cert.pem"), before[0]);
    }

    /// It is waited for by whoever comes first, who is told so; one that nobody makes has an end, and one that is
    /// there is not told of.
    #[test]
    fn an_authority_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path().join("tls");
        let (told, heard) = mpsc::channel();
        let tell = |path: &Path| told.send(path.to_owned()).unwrap();
        let short = Duration::from_millis(120);
        assert!(!Authority(&base).wait_made(short, tell).unwrap(), "nobody made it");
        assert_eq!(heard.try_recv().unwrap(), base);
        std::thread::scope(|scope| {
            let base = &base;
            let hub = scope.spawn(move || {
                assert_eq!(heard.recv().unwrap(), *base);
                Authority(base).ensure("hub").unwrap();
            });
            assert!(Authority(base).wait_made(Duration::from_secs(60), tell).unwrap());
            hub.join().unwrap();
        });
        Authority(&base).issue("filer-a").unwrap();
        assert!(Authority(&base).wait_made(Duration::ZERO, |_| panic!("it is there")).unwrap());
        let file = base.join("ca-key.pem");
        let met = Authority(&file).wait_made(short, |_| {});
        assert!(matches!(met, Err(AuthorityError::File { .. })), "no directory: {met:?}");
    }

    #[test]
    fn a_source_gets_its_name_and_a_key_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority(directory.path());
        authority.ensure("hub").unwrap();
        let (one, two) = (authority.issue("filer-a").unwrap(), authority.issue("filer-a").unwrap());
        assert_ne!(one.key, two.key);
        let cert = CertificateDer::from_pem_slice(one.cert.as_bytes()).unwrap();
        assert_eq!(Shown::of(&cert).unwrap().names, ["filer-a"]);
        assert_eq!(one.ca, fs::read_to_string(directory.path().join("ca-cert.pem")).unwrap());
    }
}

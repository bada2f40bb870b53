//! Whose certificates a database or an object store may present: the system's authorities, or the one that the settings
//! name. TLS is rustls with ring, as everywhere here.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::{self, PemObject};

use super::StoreError;
use crate::config;

/// A system's whole list of authorities has a quarter of this.
const AUTHORITY_BYTES_MAX: u64 = 1 << 20;

/// For connections to servers of these settings.
pub(super) fn client(settings: &config::Storage) -> Result<ClientConfig, StoreError> {
    let roots = settings.authority.as_deref().map_or_else(|| Ok(of_the_system()), of_file)?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| StoreError::not_done("open", "TLS", error))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(config)
}

/// Those of a file, in PEM.
pub(crate) fn of_file(path: &Path) -> Result<RootCertStore, StoreError> {
    let mut roots = RootCertStore::empty();
    let subject = path.display().to_string();
    let failed = |error: pem::Error| StoreError::not_done("read", &subject, error);
    // A device or a pipe in its place ends too.
    let file = std::fs::File::open(path).map_err(|error| failed(pem::Error::Io(error)))?;
    for certificate in CertificateDer::pem_reader_iter(file.take(AUTHORITY_BYTES_MAX)) {
        let added = roots.add(certificate.map_err(failed)?);
        added.map_err(|error| StoreError::not_done("read", &subject, error))?;
    }
    if roots.is_empty() {
        let (expected, got) = ("certificates (PEM)".to_owned(), "none".to_owned());
        return Err(StoreError::Refused { subject, expected, got });
    }
    Ok(roots)
}

fn of_the_system() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "an authority of the system cannot be read");
    }
    // Some systems hold what nobody can parse any more; a server that needs it will be refused then.
    roots.add_parsable_certificates(found.certs);
    roots
}

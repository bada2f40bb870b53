//! Reads the few facts that this project puts into a certificate. Neighbours: `authority` writes them; `identity` and
//! the carriers read them. Trust is decided elsewhere (`tls`): this reads certificates that were verified, or are our own.

use crate::{IdentityError, Peer};
use commonweal_protocol::{DeviceId, Digest};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// A device's name in its certificate is a URI of this and its identifier in hex.
pub(crate) const DEVICE_URI: &str = "commonweal://device/";

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    pub(crate) device: Option<DeviceId>,
    pub(crate) digest: Digest,
    pub(crate) not_before_ms: u64,
    pub(crate) not_after_ms: u64,
    public_key: Vec<u8>,
}

impl Certificate {
    pub(crate) fn has_key(&self, public_key: &[u8]) -> bool {
        self.public_key == public_key
    }
}

/// The facts of a certificate.
pub(crate) fn read(der: &CertificateDer<'_>) -> Result<Certificate, IdentityError> {
    let unreadable = |_| IdentityError::certificate("it is not X.509");
    let (rest, certificate) = X509Certificate::from_der(der).map_err(unreadable)?;
    if !rest.is_empty() {
        return Err(IdentityError::certificate("bytes follow it"));
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| IdentityError::certificate("its alternative names are malformed"))?;
    let mut devices =
        names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(DEVICE_URI)?.parse().ok(),
            _ => None,
        });
    let device = devices.next();
    if devices.next().is_some() {
        return Err(IdentityError::certificate("it names more than one device"));
    }
    let ms = |time: x509_parser::time::ASN1Time| {
        u64::try_from(time.timestamp()).unwrap_or_default().saturating_mul(1000)
    };
    Ok(Certificate {
        device,
        digest: Digest::of(der),
        not_before_ms: ms(certificate.validity().not_before),
        not_after_ms: ms(certificate.validity().not_after),
        public_key: certificate.public_key().subject_public_key.data.to_vec(),
    })
}

/// Who is at the other end, from the chain that they proved to hold.
pub(crate) fn peer(chain: &[CertificateDer<'_>]) -> Result<Peer, IdentityError> {
    let own = chain.first().ok_or_else(|| IdentityError::certificate("none was given"))?;
    let facts = read(own)?;
    let device = facts.device.ok_or_else(|| IdentityError::certificate("it names no device"))?;
    Ok(Peer { device, certificate: facts.digest, expires_ms: facts.not_after_ms })
}

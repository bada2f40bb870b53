//! How a device gets its identity, and how it keeps it: a single-use token and a signing request for a certificate;
//! later a fresh request over mutual TLS. Neighbours: `invitation` carries the token; `commonweal-transport::authority`
//! issues the certificates.

use crate::{AggregatorKey, DeviceId, Invalid, KeyNumber, Opaque, Token, bounds};
use serde::{Deserialize, Serialize};

/// A DER certificate signing request (PKCS #10).
pub type Csr = Opaque<{ bounds::CSR_BYTES_MAX }>;

/// DER certificates, the device's own first, the authority's last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateChain(pub Vec<Opaque<{ bounds::CERTIFICATE_BYTES_MAX }>>);

impl CertificateChain {
    pub(crate) fn check(&self) -> Result<(), Invalid> {
        Invalid::unless_at_least("certificates of a chain", self.0.len() as u64, 1u64)?;
        Invalid::unless_at_most(
            "certificates of a chain",
            self.0.len() as u64,
            bounds::CHAIN_CERTIFICATES_MAX as u64,
        )
    }
}

/// Asks for an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enroll {
    /// The single-use token of the invitation.
    pub token: Token,
    /// The request: its key is the device's, its names are ignored.
    pub csr: Csr,
}

/// Gives an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// Who the device is from now on; its certificate says the same.
    pub device: DeviceId,
    /// The device's certificate and the authority's.
    pub chain: CertificateChain,
    /// The key that signs receipts and releases now.
    pub signing_key: AggregatorKey,
    /// Its number.
    pub key_number: KeyNumber,
}

/// Asks for a fresh certificate for the same identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// The request: its key may be the old one or a new one.
    pub csr: Csr,
}

//! Adapters to and from files, bound to the base that they are for.

use anyhow::{Result, ensure};
use commonweal_adapter::{
    Adapter,
    disk::{self, AdapterFacts, AdapterKind},
};
use commonweal_runtime::Model;

/// The file of an adapter that was trained on `model`'s base.
pub(crate) fn write(adapter: &Adapter, model: &Model, kind: AdapterKind) -> Result<Vec<u8>> {
    Ok(disk::write(adapter, &AdapterFacts { base: model.manifest().base.0, kind })?)
}

/// The adapter of a file; one of another kind or for another base is refused.
pub(crate) fn read(bytes: &[u8], model: &Model, kind: AdapterKind) -> Result<Adapter> {
    let (adapter, facts) = disk::read(bytes)?;
    ensure!(facts.kind == kind, "adapter is of kind {:?}, expected {kind:?}", facts.kind);
    let (expected, got) = (model.manifest().base, commonweal_package::Hash(facts.base));
    ensure!(got == expected, "adapter is for base {got}, expected {expected}");
    Ok(adapter)
}

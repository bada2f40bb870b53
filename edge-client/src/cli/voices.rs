//! What can be talked to here: the base with the installed release, and with the personal adapter beside it. For `serve`
//! and `chat`.

use anyhow::{Context, Result};
use commonweal_adapter::Adapter;
use commonweal_runtime::Model;

use super::{exit::BadInput, identity::Identity};
use crate::{
    forget,
    install::{self, Expected, Installed},
    personal, pipeline,
    serve::Voice,
    store::Store,
    trust::Trust,
};

/// The adapters of a device, over one base.
pub(super) struct Voices {
    release: Option<Installed>,
    personal: Option<Adapter>,
}

impl Voices {
    /// Reads what there is, once what a kill left of a wish to forget is carried out.
    pub(super) fn find(model: &Model, store: &Store) -> Result<Self> {
        if forget::is_wished(store) {
            let _visiting = store.hold_visit()?;
            forget::carry_out(store)?;
        }
        let release = release(model, store)?;
        let personal = personal::read(store, pipeline::base_of(model))?;
        Ok(Self { release, personal })
    }

    /// The release's name, or `base` where none is installed.
    pub(super) fn release_name(&self) -> String {
        self.release.as_ref().map_or("base".into(), |installed| format!("release-{}", installed.version.0))
    }

    /// The release, and with the personal adapter if there is one.
    pub(super) fn all(&self, model: &Model) -> Result<Vec<Voice>> {
        let name = &model.manifest().model.name;
        let release = self.release.as_ref().map(|installed| &installed.adapter);
        let adapter = model.prepare(release)?;
        let mut voices =
            vec![Voice { name: format!("{name}/{}", self.release_name()), adapter, is_personal: false }];
        if let Some(personal) = &self.personal {
            let beside = personal::beside(release, personal).context("personal adapter")?;
            let adapter = model.prepare(Some(&beside))?;
            voices.push(Voice { name: format!("{name}/personal"), adapter, is_personal: true });
        }
        Ok(voices)
    }

    /// One of them.
    pub(super) fn one(&self, model: &Model, with_personal: bool) -> Result<Voice> {
        if with_personal && self.personal.is_none() {
            let text =
                "--personal: there is no personal adapter; `edge-client train FILE --personal` makes one";
            return Err(BadInput(text.into()).into());
        }
        let mut voices = self.all(model)?;
        Ok(voices.swap_remove(usize::from(with_personal)))
    }

    /// Tells answers of one state from those of another: base and release.
    pub(super) fn fingerprint(&self, model: &Model) -> String {
        let base: String = pipeline::base_of(model).to_string().chars().take(12).collect();
        format!("fp_{base}_{}", self.release_name())
    }
}

/// The installed release, if this device is enrolled and has one.
pub(super) fn release(model: &Model, store: &Store) -> Result<Option<Installed>> {
    let Some(Identity { credentials, .. }) = Identity::read(store)? else { return Ok(None) };
    let (base, layout) = (pipeline::base_of(model), model.layout().clone());
    Ok(install::installed(store, &Expected { trust: Trust::open(store, &credentials)?, base, layout })?)
}

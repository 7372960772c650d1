//! A layer of `tracing` that records the spans of the library.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Mutex, Once};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Span, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// A recorded span.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub name: &'static str,
    /// The index of the parent among all recorded spans.
    parent: Option<usize>,
    pub fields: BTreeMap<String, String>,
    pub events: Vec<String>,
    pub is_closed: bool,
}

impl Recorded {
    /// Returns a field, or an empty string if it has no value.
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    /// Returns the status, as in `OK` or `ERROR UNAVAILABLE`.
    pub fn status(&self) -> String {
        let code = self.field("otel.status_code");
        let status = format!("{code} {}", self.field("otel.status_description"));
        status.trim_end().to_owned()
    }
}

static RECORDED: Mutex<Vec<Recorded>> = Mutex::new(Vec::new());

/// The index of a span in `RECORDED`. The ids of closed spans are used again, so they are no key.
struct Index(usize);

struct Recorder;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        // h2 has spans too.
        if !["tonic_balance::traces", module_path!()].contains(&span.metadata().target()) {
            return;
        }
        let parent = span.parent();
        let parent = parent.and_then(|parent| Some(parent.extensions().get::<Index>()?.0));
        let mut recorded = Recorded {
            name: span.name(),
            parent,
            fields: BTreeMap::new(),
            events: Vec::new(),
            is_closed: false,
        };
        attributes.record(&mut Fields(&mut recorded.fields));
        let mut all = RECORDED.lock().unwrap();
        span.extensions_mut().insert(Index(all.len()));
        all.push(recorded);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        with(id, &context, |span| {
            values.record(&mut Fields(&mut span.fields));
        });
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let Some(id) = event.parent() else { return };
        let mut fields = BTreeMap::new();
        event.record(&mut Fields(&mut fields));
        let message = fields.remove("message").unwrap_or_default();
        with(id, &context, |span| span.events.push(message));
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        with(&id, &context, |span| span.is_closed = true);
    }
}

fn with<S: Subscriber + for<'a> LookupSpan<'a>>(
    id: &Id,
    context: &Context<'_, S>,
    change: impl FnOnce(&mut Recorded),
) {
    let span = context.span(id).unwrap();
    let index = span.extensions().get::<Index>().map(|index| index.0);
    if let Some(index) = index {
        change(&mut RECORDED.lock().unwrap()[index]);
    }
}

struct Fields<'a>(&'a mut BTreeMap<String, String>);

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

/// The span of one test. The tests of this process share the recorder, and each reads only the descendants of its own span.
pub struct Root {
    pub span: Span,
    index: usize,
}

impl Root {
    pub fn new() -> Self {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            let subscriber = tracing_subscriber::registry().with(Recorder);
            tracing::subscriber::set_global_default(subscriber).unwrap();
        });
        let span = tracing::info_span!("test");
        let index = span.with_subscriber(|(id, dispatch)| {
            let registry = dispatch.downcast_ref::<tracing_subscriber::Registry>();
            let data = registry.unwrap().span(id).unwrap();
            data.extensions().get::<Index>().unwrap().0
        });
        Self {
            index: index.unwrap(),
            span,
        }
    }

    /// Returns the spans of the calls that were made in this span, each with the spans of its attempts, in the order of their starts.
    pub fn calls(&self) -> Vec<(Recorded, Vec<Recorded>)> {
        let all = RECORDED.lock().unwrap();
        let children = |of: usize| {
            let spans = all.iter().enumerate();
            spans.filter(move |(_, span)| span.parent == Some(of))
        };
        children(self.index)
            .map(|(index, call)| {
                let attempts = children(index).map(|(_, attempt)| attempt.clone());
                (call.clone(), attempts.collect())
            })
            .collect()
    }

    /// Returns the only call with its attempts.
    pub fn call(&self) -> (Recorded, Vec<Recorded>) {
        let mut calls = self.calls();
        assert_eq!(calls.len(), 1, "{calls:?}");
        calls.remove(0)
    }
}

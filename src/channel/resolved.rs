//! Channels whose endpoints a resolver finds. The rest of the channel knows of no registry: etcd's own client runs on it.

use std::sync::Arc;

use super::{BalancedChannel, ChannelBuilder, ChannelError};
use crate::balance::{Feed, OnRefused};
use crate::resolver::{Resolver, ResolverBuilder, ResolverState};

impl ChannelBuilder<ResolverBuilder> {
    /// Changes how the service is looked for.
    ///
    /// ```no_run
    /// # fn run(registry: tonic_etcd::Registry) {
    /// use tonic_etcd::Format;
    ///
    /// let channel = registry
    ///     .channel("helloworld.Greeter")
    ///     .resolver(|resolver| resolver.format(Format::Plain))
    ///     .connect_lazy();
    /// # }
    /// ```
    pub fn resolver(mut self, configure: impl FnOnce(ResolverBuilder) -> ResolverBuilder) -> Self {
        self.source = configure(self.source);
        self
    }

    /// Makes the channel, and waits until its first endpoint is ready.
    ///
    /// # Errors
    ///
    /// If there is none: nothing is registered, no endpoint can be reached, or etcd has not answered within the start-up bound. With
    /// [`wait_for_ready`](Self::wait_for_ready) it waits for that bound in the first two cases as well.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes what it has opened.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub async fn connect(self) -> Result<BalancedChannel, ChannelError> {
        let channel = self.connect_lazy();
        channel.ready().await?;
        Ok(channel)
    }

    /// Makes the channel, and does not wait. Connections are made at once all the same; calls wait for the first.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn connect_lazy(self) -> BalancedChannel {
        let resolver = self.source.clone().start();
        let mut this = self;
        // What a name resolves to is judged like the names themselves.
        this.connector.policy = this.source.policy().clone();
        this.resolved(resolver)
    }

    pub(crate) fn over(resolver: ResolverBuilder) -> Self {
        Self::new(resolver)
    }
}

impl ChannelBuilder {
    /// Takes the endpoints from a resolver. Other than with [`from_discover`](Self::from_discover) the channel knows when a first list has
    /// come, also an empty one, and its errors say what ails etcd.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn from_resolver(self, resolver: Resolver) -> BalancedChannel {
        self.resolved(resolver)
    }
}

impl<S> ChannelBuilder<S> {
    fn resolved(self, resolver: Resolver) -> BalancedChannel {
        let mut statuses = resolver.statuses();
        let watched = statuses.clone();
        let known = async move {
            // It fails when the resolver is gone, and then nothing will be known any more.
            let known = statuses.wait_for(|status| status.state != ResolverState::Unknown);
            if known.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let trouble = move || {
            let status = watched.borrow();
            let error = status.last_error.as_ref()?;
            Some(format!("registry: {error}"))
        };
        let named = self
            .service
            .is_none()
            .then(|| resolver.service().to_owned());
        let feedback = resolver.feedback();
        let mut this = self;
        this.service = this.service.or(named);
        this.options.on_refused = Some(OnRefused(Arc::new(move |address| {
            feedback.refused(address);
        })));
        this.build(Feed::known_after(resolver, known), Some(Box::new(trouble)))
    }
}

//! Guides: the behaviour during failures, the errors, the metrics, the service config, the operation of servers and clients, and a comparison with the libraries
//! for Go.

pub mod behaviour {
    #![doc = include_str!("../docs/behaviour.md")]

    #[cfg(doc)]
    use crate::{channel::*, error::*, instance::*, registration::*, registry::*, resolver::*, *};
}

pub mod coming_from_go {
    #![doc = include_str!("../docs/coming-from-go.md")]

    #[cfg(doc)]
    use crate::{channel::*, error::*, instance::*, registration::*, registry::*, resolver::*, *};
}

pub mod metrics {
    #![doc = include_str!("../docs/metrics.md")]

    #[cfg(doc)]
    use crate::{channel::*, error::*, instance::*, registration::*, registry::*, resolver::*, *};
}

pub mod service_config {
    #![doc = include_str!("../docs/service-config.md")]

    #[cfg(doc)]
    use crate::{channel::*, error::*, instance::*, registration::*, registry::*, resolver::*, *};
}

pub mod errors {
    #![doc = include_str!("../docs/errors.md")]

    #[cfg(doc)]
    use crate::{channel::*, error::*, instance::*, registration::*, registry::*, resolver::*, *};
}

pub mod operations {
    #![doc = include_str!("../docs/operations.md")]

    #[cfg(doc)]
    use crate::{channel::*, error::*, instance::*, registration::*, registry::*, resolver::*, *};
}

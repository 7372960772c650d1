//! The scenarios of a fleet.

use std::time::Duration;

use etcd_client::CompactionOptions;
use tokio::time::{Instant, sleep, timeout};

use super::Result;
use super::fleet::{Fleet, Right, SERVICE};
use super::metrics::{Measured, Meter};
use super::options::Options;
use super::table::{Row, Scale};
use super::world::World;

/// A fleet, its etcd, and the rows that were measured so far.
pub struct Run<'a> {
    options: &'a Options,
    world: World,
    fleet: Fleet,
    rng: fastrand::Rng,
    /// The beginning of each row's name.
    prefix: &'static str,
    rows: &'a mut Vec<Row>,
}

/// Runs the scenarios with one member, without passwords.
pub async fn one_member(options: &Options, rows: &mut Vec<Row>) -> Result<()> {
    let names = [
        "start", "rest", "servers", "clients", "storm", "restart", "pause", "outage", "wipe",
    ];
    if !names.iter().any(|name| options.wants(name)) {
        return Ok(());
    }
    let mut run = Run::start(options, 1, false, "", rows).await?;
    if options.wants("rest") {
        run.rest().await?;
    }
    if options.wants("servers") {
        run.replace_servers().await?;
    }
    if options.wants("clients") {
        run.replace_clients().await?;
    }
    if options.wants("storm") {
        run.storm().await?;
    }
    if options.wants("restart") {
        run.restart("restart", Duration::ZERO).await?;
    }
    if options.wants("pause") {
        run.restart("outage of 10 s", Duration::from_secs(10))
            .await?;
    }
    if options.wants("outage") {
        let name = format!("outage of {} s", options.outage.as_secs());
        run.restart(&name, options.outage).await?;
    }
    if options.wants("wipe") {
        run.wipe().await?;
    }
    Ok(())
}

/// Runs the scenarios with three members.
pub async fn three_members(options: &Options, rows: &mut Vec<Row>) -> Result<()> {
    if !options.wants("three") && !options.wants("slow") {
        return Ok(());
    }
    let mut run = Run::start(options, 3, false, "three members: ", rows).await?;
    if options.wants("three") {
        run.rest().await?;
        run.restart_one().await?;
    }
    if options.wants("slow") {
        run.freeze().await?;
    }
    Ok(())
}

/// Runs the scenario `password`: the restart of an etcd that requires passwords.
pub async fn passwords(options: &Options, rows: &mut Vec<Row>) -> Result<()> {
    if !options.wants("password") {
        return Ok(());
    }
    let mut run = Run::start(options, 1, true, "passwords: ", rows).await?;
    let start = run.rows.last().map(|row| &row.measured.counters);
    let hash = start.map_or(0.0, |counters| {
        counters.cpu / counters.received("Authenticate")
    });
    // Each client and each server, 2 x `number` in total, exchanges its password for a token. The goal is twice the time that etcd needs
    // for one exchange of each.
    let limit = Duration::from_secs_f64(hash * 2.0 * 2.0 * options.number as f64);
    run.restart("restart", Duration::ZERO).await?;
    if let Some(right) = run.rows.last().and_then(|row| row.right) {
        let verdict = if right.all < limit {
            "reached"
        } else {
            "missed"
        };
        println!(
            "one exchange of a password costs etcd {:.0} ms of CPU time; all clients and servers were in the right state within {:?} (goal: under {limit:?}: {verdict})",
            hash * 1e3,
            right.all
        );
    }
    Ok(())
}

impl<'a> Run<'a> {
    /// Starts etcd, then the servers, and then the clients.
    async fn start(
        options: &'a Options,
        members: usize,
        protected: bool,
        prefix: &'static str,
        rows: &'a mut Vec<Row>,
    ) -> Result<Self> {
        let world = World::start(members, protected).await?;
        let fleet = Fleet::new(&world, options.ttl);
        let mut run = Run {
            options,
            world,
            fleet,
            rng: fastrand::Rng::with_seed(options.seed),
            prefix,
            rows,
        };
        let mut meter = run.meter().await?;
        let start = Instant::now();
        let (world, fleet) = (&run.world, &mut run.fleet);
        let starting = async {
            fleet.start_servers(options.number).await?;
            fleet.start_clients(options.number).await?;
            fleet.write_canary(&world.operator(0).await?).await?;
            fleet.right(start, LIMIT).await
        };
        let right = meter.during(starting).await?;
        let lists = run.fleet.lists();
        run.add(
            "start",
            meter.end().await?,
            lists,
            Some(right),
            Scale::Total,
        );
        Ok(run)
    }

    async fn meter(&self) -> Result<Meter> {
        Meter::start(&self.world.etcd).await
    }

    fn add(
        &mut self,
        name: &str,
        measured: Measured,
        lists: u64,
        right: Option<Right>,
        scale: Scale,
    ) {
        let row = Row {
            name: format!("{}{name}", self.prefix),
            number: self.options.number,
            measured,
            lists,
            right,
            scale,
            has_default_ttl: self.options.ttl.is_none(),
        };
        row.print_progress();
        self.rows.push(row);
    }

    async fn rest(&mut self) -> Result<()> {
        let lists = self.fleet.lists();
        let mut meter = self.meter().await?;
        let resting = async {
            sleep(self.options.rest).await;
            Ok(())
        };
        meter.during(resting).await?;
        let lists = self.fleet.lists() - lists;
        self.add("rest", meter.end().await?, lists, None, Scale::Rate);
        Ok(())
    }

    /// Replaces every server, one after the other, without a pause.
    async fn replace_servers(&mut self) -> Result<()> {
        let lists = self.fleet.lists();
        let order = self.order(self.fleet.servers());
        let mut meter = self.meter().await?;
        let fleet = &mut self.fleet;
        let deploy = async {
            for index in order {
                fleet.replace_server(index).await?;
            }
            Ok(Instant::now())
        };
        let end = meter.during(deploy).await?;
        let right = meter.during(fleet.right(end, LIMIT)).await?;
        let lists = self.fleet.lists() - lists;
        self.add(
            "every server replaced",
            meter.end().await?,
            lists,
            Some(right),
            Scale::Changes,
        );
        Ok(())
    }

    /// Replaces every client, one after the other, without a pause.
    async fn replace_clients(&mut self) -> Result<()> {
        let order = self.order(self.fleet.clients());
        let mut meter = self.meter().await?;
        let fleet = &mut self.fleet;
        let deploy = async {
            for index in order {
                fleet.replace_client(index).await?;
            }
            Ok(Instant::now())
        };
        let end = meter.during(deploy).await?;
        let right = meter.during(fleet.right(end, LIMIT)).await?;
        let lists = self.fleet.lists();
        self.add(
            "every client replaced",
            meter.end().await?,
            lists,
            Some(right),
            Scale::Total,
        );
        Ok(())
    }

    /// Writes a key of the service and compacts the history, every 100 ms for 10 s.
    async fn storm(&mut self) -> Result<()> {
        let lists = self.fleet.lists();
        let mut kv = self.world.operator(0).await?.kv_client();
        let mut meter = self.meter().await?;
        let (world, fleet) = (&self.world, &mut self.fleet);
        fleet.write_canary(&world.operator(0).await?).await?;
        let address = fleet.canary().to_owned();
        let key = format!("/gRPC/{SERVICE}/{address}");
        let storm = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(100));
            for number in 0..100 {
                ticks.tick().await;
                let put = kv.put(key.as_str(), address.as_str(), None).await;
                let put =
                    put.map_err(|error| format!("put number {number} of the storm: {error}"))?;
                let revision = put
                    .header()
                    .map_or(0, etcd_client::ResponseHeader::revision);
                let options = CompactionOptions::new().with_physical();
                let compacted = kv.compact(revision, Some(options)).await;
                compacted.map_err(|error| format!("compact at revision {revision}: {error}"))?;
            }
            fleet.write_canary(&world.operator(0).await?).await?;
            fleet.right(Instant::now(), LIMIT).await
        };
        let right = meter.during(storm).await?;
        let lists = self.fleet.lists() - lists;
        self.add(
            "100 puts and compactions",
            meter.end().await?,
            lists,
            Some(right),
            Scale::None,
        );
        Ok(())
    }

    /// Stops the only member gracefully, and starts it again after `down`. The measurement starts when the member is healthy.
    async fn restart(&mut self, name: &str, down: Duration) -> Result<()> {
        let lists = self.fleet.lists();
        let failed = |error| format!("restart etcd: {error}");
        let mut meter = self.meter().await?;
        self.world.etcd.stop(0).await.map_err(failed)?;
        sleep(down).await;
        self.world.etcd.restart(0).await.map_err(failed)?;
        meter.on_restarted(0);
        self.recover(name, meter, lists, Scale::Total).await
    }

    /// Kills etcd, deletes its data, and starts it again.
    async fn wipe(&mut self) -> Result<()> {
        let lists = self.fleet.lists();
        let failed = |error| format!("restart etcd without its data: {error}");
        let mut meter = self.meter().await?;
        let etcd = &mut self.world.etcd;
        etcd.kill_all().await.map_err(failed)?;
        etcd.wipe_all().await.map_err(failed)?;
        etcd.restart_all().await.map_err(failed)?;
        meter.on_restarted(0);
        self.fleet.on_wiped();
        self.recover("wipe", meter, lists, Scale::Changes).await
    }

    /// Waits until the fleet is [right](Fleet::right). Measures for at least 4/3 of the TTL, because every client and server has reacted by
    /// then.
    async fn recover(
        &mut self,
        name: &str,
        mut meter: Meter,
        lists: u64,
        scale: Scale,
    ) -> Result<()> {
        let start = Instant::now();
        let reaction = self.options.lease_ttl() * 4 / 3;
        let (world, fleet) = (&self.world, &mut self.fleet);
        let recovery = async {
            fleet.write_canary(&world.operator(0).await?).await?;
            let right = fleet.right(start, LIMIT).await;
            tokio::time::sleep_until(start + reaction).await;
            right
        };
        let right = meter.during(recovery).await?;
        let lists = self.fleet.lists() - lists;
        self.add(name, meter.end().await?, lists, Some(right), scale);
        Ok(())
    }

    /// Stops the member with the most watch streams gracefully and restarts it. The fleet must become [right](Fleet::right) before the
    /// member is restarted.
    async fn restart_one(&mut self) -> Result<()> {
        let lists = self.fleet.lists();
        let mut meter = self.meter().await?;
        let member = meter.busiest();
        let other = (member + 1) % self.world.etcd.members();
        let failed = |error| format!("restart member {member} of etcd: {error}");
        let operator = self.world.operator(other).await?;
        meter.exclude(member);
        let start = Instant::now();
        let (etcd, fleet) = (&mut self.world.etcd, &mut self.fleet);
        let stop = async { etcd.stop(member).await.map_err(failed) };
        let recovery = async {
            fleet.write_canary(&operator).await?;
            fleet.right(start, LIMIT).await
        };
        let stopped = async { tokio::try_join!(stop, recovery) };
        let ((), right) = meter.during(stopped).await?;
        self.world.etcd.restart(member).await.map_err(failed)?;
        meter.include(member);
        meter.on_restarted(member);
        let end = start + self.options.lease_ttl() * 4 / 3;
        let rest = async {
            tokio::time::sleep_until(end).await;
            Ok(())
        };
        meter.during(rest).await?;
        let lists = self.fleet.lists() - lists;
        self.add(
            "one member restarted",
            meter.end().await?,
            lists,
            Some(right),
            Scale::Total,
        );
        Ok(())
    }

    /// Freezes the member with the most watch streams for 10 s. Meanwhile a key is written. Every client must receive the key, at the
    /// latest after the member is thawed.
    async fn freeze(&mut self) -> Result<()> {
        const FROZEN: Duration = Duration::from_secs(10);
        let lists = self.fleet.lists();
        let members = self.world.etcd.members();
        let mut meter = self.meter().await?;
        let member = meter.busiest();
        let is_leader = self.world.etcd.leader().await == Some(member);
        let failed = |error| format!("freeze member {member} of etcd: {error}");
        self.world.etcd.freeze(member).await.map_err(failed)?;
        meter.exclude(member);
        let start = Instant::now();
        let (world, fleet) = (&self.world, &mut self.fleet);
        let write = async {
            let operator = world.operator((member + 1) % members).await?;
            fleet.write_canary(&operator).await
        };
        meter.during(write).await?;
        let right = meter
            .during(async { Ok(timeout(FROZEN, fleet.right(start, LIMIT)).await) })
            .await?;
        meter
            .during(async {
                tokio::time::sleep_until(start + FROZEN).await;
                Ok(())
            })
            .await?;
        self.world.etcd.thaw(member).await.map_err(failed)?;
        meter.include(member);
        let right = match right {
            Ok(right) => right?,
            // The fleet did not become right while the member was frozen.
            Err(_) => meter.during(self.fleet.right(start, LIMIT)).await?,
        };
        let lists = self.fleet.lists() - lists;
        let name = if is_leader {
            "leader frozen for 10 s"
        } else {
            "follower frozen for 10 s"
        };
        self.add(name, meter.end().await?, lists, Some(right), Scale::Total);
        Ok(())
    }

    /// Returns the numbers below `count` in random order.
    fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<_> = (0..count).collect();
        self.rng.shuffle(&mut order);
        order
    }
}

/// Limit on the time until a fleet is [right](Fleet::right).
const LIMIT: Duration = Duration::from_secs(180);

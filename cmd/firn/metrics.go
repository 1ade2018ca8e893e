package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"firn.io/firn/cluster/coordinator"
	"firn.io/firn/cluster/node"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/wire"
)

// collector makes metrics of counters that parts keep anyway, at each scrape.
type collector func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string))

// Describe says nothing: the metrics are made as they come ("unchecked").
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	c(func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, t, v, labels...)
	})
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("firn_"+name, help, labels, nil)
}

var (
	diskWritten   = describe("disk_written_bytes_total", "Bytes written to disk, by class of file: log, index, other.", "node", "class")
	diskRead      = describe("disk_read_bytes_total", "Bytes read from disk.", "node", "class")
	diskSyncs     = describe("disk_syncs_total", "Syncs of files and folders.", "node", "class")
	diskSize      = describe("disk_size_bytes", "What Firn may fill of the disk.", "node", "disk")
	diskTaken     = describe("disk_taken_bytes", "What is taken of it.", "node", "disk")
	diskLive      = describe("disk_live_bytes", "Live data.", "node", "disk")
	diskLogOut    = describe("disk_log_written_bytes_total", "Bytes that the log wrote: batch (entries and all headers), moved (survivors of collection), zeroed (spare segments, ahead of their use).", "node", "disk", "what")
	diskPending   = describe("disk_pending_updates", "Updates of the index that no checkpoint holds yet.", "node", "disk")
	diskLog       = describe("disk_log_bytes", "What the Raft logs claim.", "node", "disk")
	diskRoom      = describe("disk_room_bytes", "What live data and logs may take of it: watermarks count from this.", "node", "disk")
	diskState     = describe("disk_state", "1 ok, 2 filling (75 %), 3 slow (85 %), 4 full (90 %: writes are refused), 5 failed.", "node", "disk")
	diskCorrupt   = describe("disk_corrupt_reads_total", "Reads and moves of blocks that failed their checksums.", "node", "disk")
	diskReserve   = describe("disk_reserve_bytes", "Room held back for the index and for a start when others have filled the file system: drawn on then.", "node", "disk")
	diskFailed    = describe("disk_failed", "1: the disk failed and takes no part.", "node", "disk")
	nodeReplicas  = describe("node_replicas", "Replicas on the node.", "node")
	nodeMissing   = describe("node_missing_replicas", "Replicas that the cluster gives the node, and that are not on its usable disks.", "node")
	nodeLeading   = describe("node_leading", "Groups that the node leads.", "node")
	nodeUpkeep    = describe("node_upkeep_total", "Work in the background.", "node", "what")
	catchups      = describe("catchup_total", "Replicas filled from another one's state, by event: begun, done, failed_attempt; and views given to others.", "node", "event")
	catchupBytes  = describe("catchup_bytes_total", "Data of such replicas, in: taken, out: given.", "node", "direction")
	catchupNow    = describe("catchup_replicas", "Replicas that are being filled, or wait for it.", "node")
	catchupChunks = describe("catchup_chunks_left", "Chunks that these still lack, as far as known.", "node")
	catchupLeft   = describe("catchup_seconds_left", "The longest time that one of them will take at its pace until now.", "node")
	nodeRetired   = describe("node_retired_replicas", "Replicas that were replaced, and whose data is still to be removed.", "node")
	coordLeading  = describe("coordinator_leading", "1: the coordinator runs here.", "node")
	coordGroups   = describe("coordinator_groups", "Groups, by state: all, degraded (a replica is not well, or replaced). Only where the coordinator runs.", "node", "state")
	coordRepairs  = describe("coordinator_repairs_total", "Replacements of replicas, by event: ordered, given_up.", "node", "event")
	nodeNoSpace   = describe("node_no_space_total", "Writes refused for want of room.", "node")
	nodeCorrupt   = describe("node_corrupt_reads_total", "Reads that failed their checksums.", "node")
	volumeWritten = describe("volume_written_bytes_total", "Bytes that clients wrote.", "volume")
	volumeRead    = describe("volume_read_bytes_total", "Bytes that clients read.", "volume")
	volumeOps     = describe("volume_operations_total", "Operations of clients.", "volume", "operation")
	volumeZeroed  = describe("volume_zeroed_bytes_total", "Bytes that clients trimmed or made zero.", "volume")
	volumeEdges   = describe("volume_edge_reads_total", "Blocks read for the sake of unaligned changes.", "volume")
	volumeWaited  = describe("volume_waited_total", "Changes that waited for another one of the same blocks.", "volume")
	volumeLeft    = describe("volume_abandoned_total", "Operations whose client was gone before they ended.", "volume")
	volumeJoined  = describe("volume_joined_zeroes_total", "Large trims and zeroes (requests) that were carried out together (joins).", "volume", "what")
	volumeClients = describe("volume_clients", "Clients connected here.", "volume")
	nbdOpen       = describe("nbd_connections", "Open NBD connections.")
	nbdAccepted   = describe("nbd_accepted_total", "Accepted NBD connections.")
	nbdBad        = describe("nbd_bad_connections_total", "Connections that ended for a reason.", "reason")
	nbdEncrypted  = describe("nbd_tls_total", "NBD connections that started TLS.")
	nbdInFlight   = describe("nbd_in_flight_bytes", "Payload that NBD connections hold.")
	nbdRequests   = describe("nbd_requests_total", "NBD requests.", "command")
	nbdErrors     = describe("nbd_errors_total", "NBD errors.", "errno")
)

// nodeMetrics are those of a node; its status is asked for on its loop.
func nodeMetrics(id string, fs vfs.FS, status func() (node.Status, bool)) collector {
	return func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		for c := vfs.Class(0); c < vfs.NumClasses; c++ {
			n := fs.Counts(c)
			emit(diskWritten, prometheus.CounterValue, float64(n.WrittenBytes), id, c.String())
			emit(diskRead, prometheus.CounterValue, float64(n.ReadBytes), id, c.String())
			emit(diskSyncs, prometheus.CounterValue, float64(n.Syncs), id, c.String())
		}
		s, ok := status()
		if !ok {
			return
		}
		for _, d := range s.Disks {
			disk := d.ID.String()
			if d.ID == (block.DiskID{}) {
				disk = d.Dir // left out before it could say which it is
			}
			failed := 0.0
			if d.Failed != "" {
				failed = 1
			}
			emit(diskSize, prometheus.GaugeValue, float64(d.SizeBytes), id, disk)
			emit(diskTaken, prometheus.GaugeValue, float64(d.TakenBytes), id, disk)
			emit(diskLive, prometheus.GaugeValue, float64(d.LiveBytes), id, disk)
			emit(diskLog, prometheus.GaugeValue, float64(d.LogBytes), id, disk)
			emit(diskLogOut, prometheus.CounterValue, float64(d.Log.BatchBlocks-d.Log.MoveBlocks)*block.Size, id, disk, "batch")
			emit(diskLogOut, prometheus.CounterValue, float64(d.Log.MoveBlocks)*block.Size, id, disk, "moved")
			emit(diskLogOut, prometheus.CounterValue, float64(d.Log.ZeroedBytes), id, disk, "zeroed")
			emit(diskPending, prometheus.GaugeValue, float64(d.Pending), id, disk)
			emit(diskRoom, prometheus.GaugeValue, float64(d.Health.RoomBytes), id, disk)
			emit(diskState, prometheus.GaugeValue, float64(d.Health.State), id, disk)
			emit(diskCorrupt, prometheus.CounterValue, float64(d.Health.Corrupt), id, disk)
			emit(diskReserve, prometheus.GaugeValue, float64(d.ReserveBytes), id, disk)
			emit(diskFailed, prometheus.GaugeValue, failed, id, disk)
		}
		emit(nodeReplicas, prometheus.GaugeValue, float64(len(s.Replicas)), id)
		emit(nodeMissing, prometheus.GaugeValue, float64(s.Missing), id)
		emit(nodeLeading, prometheus.GaugeValue, float64(s.Leading()), id)
		emit(nodeRetired, prometheus.GaugeValue, float64(s.Retired), id)
		emit(nodeNoSpace, prometheus.CounterValue, float64(s.Counters.NoSpace), id)
		emit(nodeCorrupt, prometheus.CounterValue, float64(s.Counters.CorruptReads), id)
		emitCatchUp(emit, id, &s)
		for _, u := range []struct {
			what string
			n    uint64
		}{
			{"checkpoint", s.Counters.Checkpoints}, {"flush", s.Counters.Flushes}, {"truncation", s.Counters.Truncations},
			{"moved_run", s.Counters.Moved}, {"reaper_job", s.Counters.Reaped}, {"replica_removed", s.Counters.Removed},
		} {
			emit(nodeUpkeep, prometheus.CounterValue, float64(u.n), id, u.what)
		}
	}
}

// coordinatorMetrics are those of a node's candidate for coordinator.
func coordinatorMetrics(id string, status func() (coordinator.Status, bool)) collector {
	return func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		s, ok := status()
		if !ok {
			return
		}
		leading := 0.0
		if s.Leading {
			leading = 1
			emit(coordGroups, prometheus.GaugeValue, float64(s.Groups), id, "all")
			emit(coordGroups, prometheus.GaugeValue, float64(s.Degraded), id, "degraded")
		}
		emit(coordLeading, prometheus.GaugeValue, leading, id)
		emit(coordRepairs, prometheus.CounterValue, float64(s.Ordered), id, "ordered")
		emit(coordRepairs, prometheus.CounterValue, float64(s.GivenUp), id, "given_up")
	}
}

func emitCatchUp(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string), id string, s *node.Status) {
	c := &s.Counters
	emit(catchups, prometheus.CounterValue, float64(c.Copies), id, "begun")
	emit(catchups, prometheus.CounterValue, float64(c.CopiesDone), id, "done")
	emit(catchups, prometheus.CounterValue, float64(c.CopyFailures), id, "failed_attempt")
	emit(catchups, prometheus.CounterValue, float64(c.CopyViews), id, "view")
	emit(catchupBytes, prometheus.CounterValue, float64(c.CopyBytesIn), id, "in")
	emit(catchupBytes, prometheus.CounterValue, float64(c.CopyBytesOut), id, "out")
	replicas, chunks, left := 0, 0, 0.0
	for _, r := range s.Replicas {
		if r.Copy != nil {
			replicas++
			chunks += r.Copy.Total - r.Copy.Done
			left = max(left, r.Copy.Left.Seconds())
		}
	}
	emit(catchupNow, prometheus.GaugeValue, float64(replicas), id)
	emit(catchupChunks, prometheus.GaugeValue, float64(chunks), id)
	emit(catchupLeft, prometheus.GaugeValue, left, id)
}

func gatewayMetrics(g *gateway.Gateway, server *nbd.Server) collector {
	return func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		for _, v := range g.Volumes() {
			name := v.Geometry.Name
			emit(volumeWritten, prometheus.CounterValue, float64(v.Stats.WrittenBytes), name)
			emit(volumeRead, prometheus.CounterValue, float64(v.Stats.ReadBytes), name)
			emit(volumeOps, prometheus.CounterValue, float64(v.Stats.Reads), name, "read")
			emit(volumeOps, prometheus.CounterValue, float64(v.Stats.Writes), name, "write")
			emit(volumeOps, prometheus.CounterValue, float64(v.Stats.Zeroes), name, "zero")
			emit(volumeOps, prometheus.CounterValue, float64(v.Stats.Flushes), name, "flush")
			emit(volumeZeroed, prometheus.CounterValue, float64(v.Stats.ZeroedBytes), name)
			emit(volumeEdges, prometheus.CounterValue, float64(v.Stats.EdgeReads), name)
			emit(volumeWaited, prometheus.CounterValue, float64(v.Stats.Waited), name)
			emit(volumeLeft, prometheus.CounterValue, float64(v.Stats.Abandoned), name)
			emit(volumeJoined, prometheus.CounterValue, float64(v.Stats.Joined), name, "requests")
			emit(volumeJoined, prometheus.CounterValue, float64(v.Stats.Joins), name, "joins")
			emit(volumeClients, prometheus.GaugeValue, float64(v.Clients), name)
		}
		s := server.Stats()
		emit(nbdOpen, prometheus.GaugeValue, float64(s.Connections))
		emit(nbdAccepted, prometheus.CounterValue, float64(s.Accepted))
		emit(nbdEncrypted, prometheus.CounterValue, float64(s.Encrypted))
		emit(nbdInFlight, prometheus.GaugeValue, float64(s.InFlightBytes))
		emit(nbdBad, prometheus.CounterValue, float64(s.Refused), "refused")
		emit(nbdBad, prometheus.CounterValue, float64(s.HandshakeFailures), "handshake")
		emit(nbdBad, prometheus.CounterValue, float64(s.Violations), "violation")
		emit(nbdBad, prometheus.CounterValue, float64(s.Superseded), "superseded")
		emit(nbdBad, prometheus.CounterValue, float64(s.Moved), "moved")
		for c, n := range s.Requests {
			emit(nbdRequests, prometheus.CounterValue, float64(n), wire.Command(c).String())
		}
		for i, n := range s.Errors {
			emit(nbdErrors, prometheus.CounterValue, float64(n), wire.Errnos[i].String())
		}
	}
}

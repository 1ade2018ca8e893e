// Package sim runs a whole cluster in one goroutine and virtual time: storage
// nodes, coordinators and two gateways, all of production code, over a simulated
// network, simulated disks and a metadata server in memory. What breaks, when
// and for how long is drawn from one seed; the same seed gives the same run,
// event by event.
//
//	cluster, disk, gateway  machines, which survive, and the processes on them
//	faults                  what breaks
//	workload, resize, churn what clients do, and what must be true of it
//	linear, compare, finale checks besides the exact history of test/stamp
//
//	go test ./test/sim -run TestSeed -seed 17     replays one
//	FIRN_SIM_SEEDS=500 go test ./test/sim         runs many
package sim

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/fnv"
	"io"
	"log/slog"
	"syscall"
	"time"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/coordinator"
	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport"
	simnet "firn.io/firn/cluster/transport/sim"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// Options of a run.
type Options struct {
	Seed  uint64
	Nodes int
	// Replicas of the volume; 0 is one on each node.
	Replicas int
	// VolumeBytes is the size of the volume under load.
	VolumeBytes int64
	// Writers is how many operations are in flight.
	Writers int
	// Pause is how often their number is topped up; 0 is fillPause.
	Pause time.Duration
	// Duration is how long faults happen, in virtual time.
	Duration time.Duration
	// Plain is for scripts: nothing is drawn but the load. DiskBytes, if set, is
	// the size of the disks; SlowMerges how many times slower than usual
	// checkpoints are.
	Plain      bool
	DiskBytes  int64
	SlowMerges int
	// Restores lets the metadata store be set back to backups. Nothing is lost by
	// that, but an operator has to act: see docs/reliability.md.
	Restores bool
	// AbsentAfter and ReplaceAfter are the coordinator's; 0 is its default.
	AbsentAfter, ReplaceAfter time.Duration
	// Log takes what nodes say; nil drops it.
	Log io.Writer
}

// Cluster is a simulated cluster.
type Cluster struct {
	World *loop.World
	Net   *simnet.Net
	Meta  *meta.Mem

	opt       Options
	ctx       context.Context
	id        block.ClusterID
	diskBytes int64
	nodes     []*storage
	seats     []*seat
	volume    meta.VolumeMeta // under load
	start     clock.Instant

	// victim is the one node whose disk may lose what it has promised.
	victim   *storage
	restored bool // the metadata were set back to a backup

	failure error
	events  uint64
	trace   hash.Hash64
}

// storage is one node: the machine, which survives crashes, and the process.
type storage struct {
	c     *Cluster
	id    block.NodeID
	fs    *vfs.Sim
	store *memstore.Store // what the disk holds of the index
	diskFaults

	loop  *loop.Sim // nil while the process is down
	node  *node.Node
	clock float64 // rate of the machine's clock
	// broken says that no process starts any more: the disk is gone.
	broken bool
	rotten bool // bytes of the disk were inverted
}

func newCluster(opt Options) *Cluster {
	w := loop.NewWorld(opt.Seed)
	c := &Cluster{World: w, Net: simnet.New(w), opt: opt, ctx: context.Background(), start: w.Now(), trace: fnv.New64a()}
	c.id = c.uuid()
	c.diskBytes = largeDisk
	if w.Rand().IntN(3) == 0 {
		c.diskBytes = smallDisk
	}
	c.diskBytes = cmp.Or(opt.DiskBytes, c.diskBytes)
	server := w.NewLoop(nil)
	c.Meta = meta.NewMem(server)
	server.Post(func() { c.Meta.Drive(server) })
	return c
}

// uuid draws an id from the seed.
func (c *Cluster) uuid() (u [16]byte) {
	binary.LittleEndian.PutUint64(u[:], c.World.Rand().Uint64())
	binary.LittleEndian.PutUint64(u[8:], c.World.Rand().Uint64())
	return block.MarkUUID(u)
}

func (c *Cluster) since(t clock.Instant) time.Duration { return t.Sub(c.start) }

func (c *Cluster) logf(format string, args ...any) {
	if c.opt.Log != nil {
		fmt.Fprintf(c.opt.Log, "%12v  %s\n", c.since(c.World.Now()), fmt.Sprintf(format, args...))
	}
}

// step runs one event and takes its instant into the trace.
func (c *Cluster) step() bool {
	if !c.World.Step() {
		return false
	}
	c.events++
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(c.World.Now()))
	c.trace.Write(b[:])
	return true
}

// runFor runs the next d of virtual time.
func (c *Cluster) runFor(d time.Duration) { c.runUntil(d, func() bool { return false }) }

// runUntil runs events until cond holds or limit has passed; it returns cond().
func (c *Cluster) runUntil(limit time.Duration, cond func() bool) bool {
	over := false
	c.World.At(c.World.Now().Add(limit), func() { over = true })
	for !over && c.failure == nil && !cond() && c.step() {
	}
	return cond()
}

func nodeName(id block.NodeID) string { return fmt.Sprintf("node%d", id) }

func (c *Cluster) addNode(id block.NodeID) *storage {
	s := &storage{c: c, id: id, clock: 1}
	s.newDisk()
	c.nodes = append(c.nodes, s)
	return s
}

// pace is that of a disk of 64 MiB, so that everything happens in a short run.
var pace = node.Pace{
	SegmentBytes:      2 << 20,
	LogBytes:          6 << 20,
	CheckpointUpdates: 4000,
	CheckpointAge:     2 * time.Second,
	Upkeep:            100 * time.Millisecond,
}

// up starts the process of a node.
func (s *storage) up() error {
	c := s.c
	s.diskFaults = diskFaults{}
	s.fs.SetRule(s.diskRule)
	s.fs.SetReadRule(s.readRule)
	s.loop = c.World.NewLoop(s.latency)
	s.loop.SetClock(s.clock, 0)
	me := nodeName(s.id)
	incarnation := c.World.Rand().Uint64()
	cfg := node.Config{
		ID: s.id, Cluster: c.id, Listen: me, Boot: me, FS: s.fs, Meta: c.Meta.Client(), Loop: s.loop, Incarnation: incarnation,
		Disks:     []node.DiskConfig{{Dir: diskDir, CapacityBytes: c.diskBytes}},
		OpenStore: func(string) (index.Store, error) { return s.openStore() },
		Network: c.Net.Network(me, s.loop, transport.Identity{Hello: transport.Hello{
			Cluster: c.id, Node: s.id, Session: incarnation}}),
		NewDiskID: func() block.DiskID { return c.uuid() },
		Pace:      pace,
		Logf:      func(format string, args ...any) { c.logf(me+": "+format, args...) },
	}
	n, err := node.Open(c.ctx, cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", me, err)
	}
	s.node = n
	s.loop.Post(func() {
		if err := n.Start(); err != nil {
			panic(fmt.Sprintf("%s: %v", me, err)) // nothing else has its address
		}
		s.coordinate()
	})
	return nil
}

// crash ends the process and its machine's power at once. It comes back after
// a while.
func (s *storage) crash() {
	c := s.c
	c.logf("%s crashes", nodeName(s.id))
	s.kill()
	s.crashDisk()
	s.back(50*time.Millisecond + time.Duration(c.World.Rand().Int64N(int64(3*time.Second))))
}

// kill ends the process, and no more.
func (s *storage) kill() {
	s.loop.Kill()
	s.loop, s.node = nil, nil
	s.c.Net.Crash(nodeName(s.id))
	s.c.Net.Crash(coordinatorName(s.id))
}

// back starts the process after a while.
func (s *storage) back(after time.Duration) {
	c := s.c
	c.World.At(c.World.Now().Add(after), func() {
		if s.broken || s.running() {
			return
		}
		c.logf("%s comes back", nodeName(s.id))
		switch err := s.up(); {
		case err != nil && s == c.victim:
			// Its operator gives it another disk.
			c.logf("%v", err)
			s.replace()
		case errors.Is(err, block.NoSpace), errors.Is(err, syscall.ENOSPC):
			c.logf("%v", err)
			s.back(time.Second) // its supervisor starts it again, until there is room
		case err != nil:
			c.fail(err)
		}
	})
}

// restart stops the process in order and starts it again: leads move away.
func (s *storage) restart() {
	c, l := s.c, s.loop
	c.logf("%s restarts", nodeName(s.id))
	l.Post(func() {
		s.node.Stop(func(error) {
			c.World.At(c.World.Now(), func() {
				if s.loop == l {
					s.kill()
					s.crashDisk()
					s.back(100 * time.Millisecond)
				}
			})
		})
	})
}

func (s *storage) running() bool { return s.node != nil }

func coordinatorName(id block.NodeID) string { return nodeName(id) + "/coordinator" }

// coordinate runs a candidate for coordinator beside the node, with a client
// that carries deletions to the groups, as production does.
func (s *storage) coordinate() {
	c := s.c
	client := cluster.New(cluster.Config{Loop: s.loop, Store: c.Meta.Client(), Cluster: c.id, Log: quiet,
		Network: c.Net.Network(coordinatorName(s.id), s.loop, transport.Identity{Hello: transport.Hello{Cluster: c.id, Session: c.World.Rand().Uint64()}})})
	client.Start(c.ctx)
	coordinator.New(coordinator.Config{Loop: s.loop, Store: c.Meta.Client(), Node: s.id, Deleter: client,
		AbsentAfter: c.opt.AbsentAfter, ReplaceAfter: c.opt.ReplaceAfter}).Start(c.ctx)
}

var quiet = slog.New(slog.DiscardHandler)

// fail notes the first thing that is wrong; the run ends with it.
func (c *Cluster) fail(err error) {
	if c.failure == nil {
		c.failure = err
		c.logf("FAILED: %v", err)
	}
}

package sim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

const (
	diskDir = "disk"
	// What a node may fill: so little that it runs full when one lags, or enough.
	// Its file system has twice as much.
	smallDisk = 96 << 20
	largeDisk = 384 << 20
)

var (
	errPower = errors.New("the power is off")
	errIO    = block.Errorf(block.Internal, "input/output error")
)

// diskFaults is what is wrong with a disk. A crash ends it.
type diskFaults struct {
	// crashIn is in how many writes the power fails; 0: it does not.
	crashIn int
	// crashFlush: the power fails between the next checkpoint and its flush.
	crashFlush bool
	// failWrite and failSync make the next one fail; then the disk is gone.
	failWrite, failSync bool
	// badReads is how many reads fail or bring other bytes than they should.
	badReads int
	// stalled is until when the disk does nothing.
	stalled clock.Instant
}

// newDisk gives the machine an empty disk.
func (s *storage) newDisk() {
	s.fs = vfs.NewSim(2 * s.c.diskBytes)
	s.store = memstore.New()
}

// openStore opens what the index's store has kept.
func (s *storage) openStore() (index.Store, error) {
	s.store = s.store.Crash(s.store.Unflushed())
	s.store.BeforeFlush(func() error {
		if !s.crashFlush {
			return nil
		}
		s.powerFails()
		return errPower
	})
	return s.store, nil
}

// crashDisk takes the power away: of what was not synced, what remains is drawn
// from the seed, in the files by sectors and in the store by batches.
func (s *storage) crashDisk() {
	r := s.c.World.Rand()
	s.fs = s.fs.Crash(r)
	s.store = s.store.Crash(r.IntN(s.store.Unflushed() + 1))
}

// latency is that of a node's blocking work.
func (s *storage) latency(class loop.Class, r *rand.Rand) time.Duration {
	d := loop.DefaultLatency(class, r)
	if class == loop.Merge {
		d *= time.Duration(max(1, s.c.opt.SlowMerges))
	}
	if rest := s.stalled.Sub(s.c.World.Now()); rest > 0 && class != loop.Meta {
		d += rest
	}
	return d
}

// diskRule is asked before each call of the file system.
func (s *storage) diskRule(call vfs.Call) error {
	write := call.Op == vfs.OpWrite || call.Op == vfs.OpSync || call.Op == vfs.OpNames || call.Op == vfs.OpSyncDir
	switch {
	case s.crashIn > 0 && write:
		if s.crashIn--; s.crashIn == 0 {
			s.powerFails()
			return errPower
		}
	case s.failWrite && call.Op == vfs.OpWrite, s.failSync && call.Op == vfs.OpSync:
		s.c.logf("%s: %s fails", nodeName(s.id), call.Name)
		s.failWrite, s.failSync = false, false
		return errIO
	}
	return nil
}

// powerFails crashes the node within a call. Nothing of the process runs after
// this; the rest is done outside of the work that is running.
func (s *storage) powerFails() {
	l := s.loop
	s.fs.Kill(errPower)
	l.Kill()
	s.c.World.At(s.c.World.Now(), func() {
		if s.loop == l {
			s.crash()
		}
	})
}

// readRule spoils reads of data.
func (s *storage) readRule(call vfs.Call) vfs.ReadFault {
	if s.badReads == 0 || !strings.HasSuffix(call.Name, ".seg") {
		return vfs.ReadFault{}
	}
	s.badReads--
	switch s.c.World.Rand().IntN(3) {
	case 0:
		return vfs.ReadFault{Err: errIO}
	case 1:
		return vfs.ReadFault{Shift: block.Size}
	}
	return vfs.ReadFault{Stale: true}
}

// rot inverts a few bytes of a few blocks of the log.
func (s *storage) rot() {
	s.rotten = true
	r := s.c.World.Rand()
	names, err := s.fs.List(diskDir + "/log")
	for range 8 {
		if err != nil || len(names) == 0 {
			return
		}
		name := fmt.Sprintf("%s/log/%s", diskDir, names[r.IntN(len(names))])
		err = s.fs.Rot(name, r.Int64N(pace.SegmentBytes/block.Size)*block.Size+r.Int64N(block.Size-8), 8)
	}
}

// replace gives the machine an empty disk and starts it: what it had is lost.
func (s *storage) replace() {
	s.c.logf("%s has an empty disk", nodeName(s.id))
	if s.running() {
		s.kill()
	}
	s.newDisk()
	s.rotten = false
	if err := s.up(); err != nil {
		s.c.fail(err)
	}
}

// failed tells whether the node runs on without its disk.
func (s *storage) failed() bool {
	if !s.running() {
		return false
	}
	for _, d := range s.node.Status().Disks {
		if d.Failed != "" {
			return true
		}
	}
	return false
}

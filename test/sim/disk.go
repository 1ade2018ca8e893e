package sim

import (
	"errors"

	"firn.io/firn/cluster/index"
	"firn.io/firn/cluster/index/memstore"
	"firn.io/firn/internal/vfs"
)

const (
	diskDir = "disk"
	// What a node may fill: so little that it runs full when one lags, or enough.
	// Its file system has twice as much.
	smallDisk = 96 << 20
	largeDisk = 384 << 20
)

var errPower = errors.New("the power is off")

// newDisk gives the machine an empty disk.
func (s *storage) newDisk() {
	s.fs = vfs.NewSim(2 * s.c.diskBytes)
	s.store = memstore.New()
}

// openStore opens what the index's store has kept.
func (s *storage) openStore() (index.Store, error) {
	s.store = s.store.Crash(s.store.Unflushed())
	return s.store, nil
}

// crashDisk takes the power away: of what was not synced, what remains is drawn
// from the seed, in the files by sectors and in the store by batches.
func (s *storage) crashDisk() {
	r := s.c.World.Rand()
	s.fs = s.fs.Crash(r)
	s.store = s.store.Crash(r.IntN(s.store.Unflushed() + 1))
}

// crashInWrite crashes the node within its next write to the disk: between
// what it writes and its sync, or in the middle.
func (s *storage) crashInWrite() {
	left := 1 + s.c.World.Rand().IntN(6)
	fs, l := s.fs, s.loop
	fs.SetRule(func(call vfs.Call) error {
		if call.Op != vfs.OpWrite && call.Op != vfs.OpSync && call.Op != vfs.OpNames && call.Op != vfs.OpSyncDir {
			return nil
		}
		if left--; left > 0 {
			return nil
		}
		// Nothing of the process runs after this; the rest is done outside of the
		// work that is running.
		fs.Kill(errPower)
		l.Kill()
		s.c.World.At(s.c.World.Now(), func() {
			if s.loop == l {
				s.crash()
			}
		})
		return errPower
	})
}

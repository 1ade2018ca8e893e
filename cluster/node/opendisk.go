package node

import (
	"errors"
	"time"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// openDisk makes a disk ready: locked, formatted if it is new, its log and
// index recovered. One that cannot be used comes back with failed set, so that the
// node's others go on; an error, of kind Busy, is that another process has it.
func openDisk(n *Node, cfg DiskConfig) (*disk, error) {
	d := &disk{node: n, loop: n.cfg.DiskLoop(), cfg: cfg}
	err := d.open()
	switch {
	case err == nil:
	case d.lock == nil && block.KindOf(err) == block.Busy:
		return nil, err
	case d.failed == nil:
		d.leaveOut(err)
	}
	return d, nil
}

func (d *disk) open() error {
	fs, dir := d.node.cfg.FS, d.cfg.Dir
	if err := mustNotBeGone(fs, dir); err != nil {
		return err
	}
	lock, err := vfs.Lock(fs, dir)
	if err != nil && block.KindOf(err) != block.Busy {
		return block.Wrap(block.KindOf(err), err, "%s cannot be used: look whether it is a folder, on a file system that is mounted for writing", dir)
	}
	if err != nil {
		return err
	}
	d.lock = lock
	if err := d.identify(); err != nil {
		return err
	}
	if d.failed != nil {
		return nil
	}
	return d.recover()
}

// leaveOut sets a disk aside that could not be opened. After a failed sync it has
// failed, for good. Anything else (damage, a file system that is read-only, too
// few file descriptors, an error of a read) is for this start only: the disk is
// not there, and one that finds it well uses it.
func (d *disk) leaveOut(err error) {
	n := d.node
	d.failed = err
	d.absent = true
	n.logf("disk %v in %s is left out: %v", d.id, d.cfg.Dir, err)
	if errors.Is(err, vfs.ErrSync) && !d.id.IsZero() {
		d.absent = false
		if merr := seglog.MarkFailed(n.cfg.FS, d.cfg.Dir, d.sb, err.Error()); merr != nil {
			n.logf("disk %v: mark it as failed: %v", d.id, merr)
		}
	}
	if cerr := d.closeIndex(); cerr != nil {
		n.logf("disk %v in %s: %v", d.id, d.cfg.Dir, cerr)
	}
}

// identify reads the superblock, or formats an empty folder.
func (d *disk) identify() error {
	n, fs, dir := d.node, d.node.cfg.FS, d.cfg.Dir
	sb, err := seglog.Load(fs, dir)
	if err != nil && block.KindOf(err) == block.NotFound {
		if err := mustBeEmpty(fs, dir); err != nil {
			return err
		}
		sb = seglog.Superblock{Cluster: n.cfg.Cluster, Disk: n.cfg.NewDiskID(), Node: n.cfg.ID, SegmentBytes: n.cfg.Pace.SegmentBytes, Created: n.cfg.Created}
		if err = seglog.Format(fs, dir, sb); err == nil {
			n.logf("%s is empty and becomes disk %v; if another disk should have been mounted there, stop this node and mount it", dir, sb.Disk)
		}
	}
	switch {
	case err != nil:
		return err
	case sb.Cluster != n.cfg.Cluster:
		return block.Errorf(block.Denied, "%s is a disk of cluster %v, this is cluster %v: give another folder, or the right metadata store", dir, sb.Cluster, n.cfg.Cluster)
	case sb.Node != n.cfg.ID:
		return block.Errorf(block.Denied, "%s is a disk of node %d, this is node %d: start it with --id %d, or give this node another folder with --disk; a folder that never held data of the cluster can be emptied and used", dir, sb.Node, n.cfg.ID, sb.Node)
	}
	d.sb, d.id = sb, sb.Disk
	if err := seglog.Remember(fs, dir, sb); err != nil {
		n.logf("disk %v: note beside %s that it is there: %v", d.id, dir, err)
	}
	reason, failed, err := seglog.FailedReason(fs, dir, sb)
	if failed {
		d.failed = block.Errorf(block.Unavailable, "disk %v failed before: %s; replace it", d.id, reason)
	}
	return err
}

// mustNotBeGone refuses a folder that is missing where a disk was: made anew it
// would hide what may come back, a mount or a folder that was moved.
func mustNotBeGone(fs vfs.FS, dir string) error {
	if _, err := fs.Stat(dir); err == nil || block.KindOf(err) != block.NotFound {
		return err
	}
	if id, known := seglog.Remembered(fs, dir); known {
		return block.Errorf(block.NotFound, "the folder %s of disk %s is gone: mount the disk, or put the folder back, and start again; "+
			"to begin with an empty disk in its place, make an empty folder there", dir, id)
	}
	return nil
}

// mustBeEmpty refuses to format a folder that holds something else.
func mustBeEmpty(fs vfs.FS, dir string) error {
	names, err := fs.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name != vfs.LockName && name != "lost+found" && !vfs.IsTemp(name) {
			return block.Errorf(block.Denied, "%s is not empty and not a disk of Firn (it holds %q, and no disk.json): give an empty folder; "+
				"if it was a disk, put its disk.json back", dir, name)
		}
	}
	return nil
}

const (
	// maxOpenSegments bounds the segments of a disk's log that are open in the
	// system at once; those that are being written come on top.
	maxOpenSegments = 2048
	// watchInterval is how often a disk's folder is looked at.
	watchInterval = 2 * time.Second
	// A reserve is this part of the disk, within bounds (see vfs.Reserve).
	reservePart     = 64
	minReserveBytes = 1 << 20
	maxReserveBytes = 64 << 20
)

// watch fails the disk when its folder is gone, or is another's: files that are
// open go on to be written, and no start would find them.
func (d *disk) watch(now clock.Instant) {
	n := d.node
	if d.watching || now.Sub(d.watched) < watchInterval {
		return
	}
	d.watching = true
	fs, dir := n.cfg.FS, d.cfg.Dir
	var sb seglog.Superblock
	var err error
	d.loop.Do(loop.DiskRead, func() { sb, err = seglog.Load(fs, dir) }, func() {
		d.watching, d.watched = false, n.loop.Now()
		switch {
		case d.failed != nil || n.stopped:
		case err != nil && block.KindOf(err) == block.NotFound:
			d.fail(err)
		case err == nil && sb.Disk != d.id:
			d.fail(block.Errorf(block.Unavailable, "its folder %s holds disk %v now, exchanged while it was in use: start the node again to use that one", dir, sb.Disk))
		}
	})
}

func (d *disk) openReserve() (*vfs.Reserve, error) {
	fs, dir := d.node.cfg.FS, d.cfg.Dir
	sp, err := fs.Space(dir)
	if err != nil {
		return nil, err
	}
	size := sp.TotalBytes
	if c := d.cfg.CapacityBytes; c > 0 {
		size = min(size, c)
	}
	return vfs.OpenReserve(fs, dir, min(maxReserveBytes, max(minReserveBytes, size/reservePart)))
}

// makeRoom lets what waits for room try again, and fills the reserve when there
// is some. It tells a person when the file system runs full, and when that ends.
func (d *disk) makeRoom() {
	if short := d.reserve.Short(); short != d.short {
		d.short = short
		if short {
			d.node.logf("disk %v: its file system is full, others have filled it: writes are refused, reads go on; make room in %s", d.id, d.cfg.Dir)
		} else {
			d.node.logf("disk %v: its file system has room again", d.id)
		}
	}
	if d.filling || d.reserve.Whole() && !d.reserve.Stuck() {
		return
	}
	d.filling = true
	d.loop.Do(loop.DiskWrite, d.reserve.Retry, func() { d.filling = false })
}

package node

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
)

// quarantineName is the file of a disk that lists the replicas on it that were
// found damaged and marked so in the metadata store: a line each of group,
// replica and reason. A node that starts opens its replicas before the store
// has told it anything; these it does not, so that they never vote again (L4).
const (
	quarantineName     = "quarantine"
	maxQuarantineBytes = 1 << 20
	maxReasonBytes     = 200
)

// quarantined is what a disk has in quarantine. The file follows the list.
type quarantined struct {
	list    map[seglog.ReplicaKey]string
	writing bool
	behind  bool // the list has changed since the write under way began
}

// load reads the list. It blocks. What cannot be read is lost: the store has it,
// too, and tells of it as soon as it answers.
func (q *quarantined) load(fs vfs.FS, dir string) error {
	q.list = make(map[seglog.ReplicaKey]string)
	p, err := vfs.ReadFile(fs, path.Join(dir, quarantineName), maxQuarantineBytes)
	if err != nil {
		if block.KindOf(err) == block.NotFound {
			return nil
		}
		return err
	}
	return q.decode(p)
}

// decode adds what a file lists, up to the first line that makes no sense (kind
// Corrupt).
func (q *quarantined) decode(p []byte) error {
	for line := range strings.Lines(string(p)) {
		names, reason, told := strings.Cut(strings.TrimSuffix(line, "\n"), ": ")
		group, id, two := strings.Cut(names, " ")
		g, gerr := strconv.ParseUint(group, 10, 64)
		r, rerr := strconv.ParseUint(id, 10, 64)
		if !told || !two || gerr != nil || rerr != nil || g == 0 || r == 0 {
			return block.Errorf(block.Corrupt, "%s: a line that names no replica: %.80q", quarantineName, line)
		}
		q.list[seglog.ReplicaKey{Group: block.GroupID(g), Replica: block.ReplicaID(r)}] = reason
	}
	return nil
}

// encode returns the file's content, in the order of the replicas.
func (q *quarantined) encode() []byte {
	var b strings.Builder
	for _, key := range sortedFunc(q.list, seglog.ReplicaKey.Compare) {
		reason := strings.ReplaceAll(q.list[key], "\n", " ")
		fmt.Fprintf(&b, "%d %d: %s\n", key.Group, key.Replica, reason[:min(len(reason), maxReasonBytes)])
	}
	return []byte(b.String())
}

// confine puts a replica on the disk's list, or takes it off (reason ""): once
// nothing of it is left.
func (d *disk) confine(key seglog.ReplicaKey, reason string) {
	q := &d.quarantine
	if _, in := q.list[key]; in == (reason != "") {
		return
	}
	if reason == "" {
		delete(q.list, key)
	} else {
		q.list[key] = reason
	}
	q.behind = true
	d.writeQuarantine()
}

func (d *disk) writeQuarantine() {
	q, n := &d.quarantine, d.node
	if q.writing || !q.behind || d.failed != nil || n.stopped {
		return
	}
	q.writing, q.behind = true, false
	p, fs, name := q.encode(), n.cfg.FS, path.Join(d.cfg.Dir, quarantineName)
	var err error
	d.work(loop.DiskWrite, func() { err = vfs.WriteFileAtomic(fs, name, p) }, func() {
		q.writing = false
		if err != nil {
			n.logf("disk %v: the list of replicas in quarantine: %v", d.id, err)
			q.behind = true
			n.loop.After(metaRetry, d.writeQuarantine)
			return
		}
		d.writeQuarantine()
	})
}

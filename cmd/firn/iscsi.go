package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/iscsi"
	"firn.io/firn/iscsi/scsi"
)

// iscsiFlags say where and how volumes are served over iSCSI.
type iscsiFlags struct {
	addr, advertise string
}

func (f *iscsiFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.addr, "iscsi", "", "serve every volume over iSCSI here: HOST:PORT, or HOST for port 3260; empty: nowhere")
	cmd.Flags().StringVar(&f.advertise, "advertise-iscsi", "", "HOST:PORT that initiators reach --iscsi at, if it differs")
}

// iscsiFront is an iSCSI listener that does not serve yet; l is nil without one.
type iscsiFront struct {
	l      net.Listener
	portal string
}

func (f *iscsiFlags) listen(ctx context.Context, parts *stack) (front iscsiFront, err error) {
	if f.addr == "" {
		return front, nil
	}
	if front.l, err = iscsi.Listen(ctx, f.addr); err != nil {
		return front, addressError("--iscsi", f.addr, err)
	}
	parts.push("iSCSI listener", closing(front.l))
	front.portal = f.advertise
	return front, nil
}

// serveISCSI serves the gateway's volumes on the listener and pushes the stop.
func (s *served) serveISCSI(front iscsiFront, parts *stack, failed func(error)) *iscsi.Server {
	if front.l == nil {
		return nil
	}
	opt := iscsi.Options{Log: slog.Default()}
	if front.portal != "" {
		opt.Portals = []string{front.portal}
	}
	targets := &volumeTargets{gateway: s.gateway, store: s.store, times: latenciesOf(s.times, "iscsi"), units: map[block.VolumeID]*sharedUnit{}}
	server := iscsi.NewServer(targets, opt)
	targets.server = server
	s.targets = targets
	serving := make(chan struct{})
	go func() {
		defer close(serving)
		if err := server.Serve(front.l); !errors.Is(err, iscsi.ErrServerClosed) {
			failed(block.Wrap(block.Unavailable, err, "iSCSI server"))
		}
	}()
	parts.push("iSCSI server", func(ctx context.Context) error {
		err := stopClients(ctx, "iSCSI", server.Shutdown)
		<-serving
		return err
	})
	return server
}

// volumeTargets shows every volume as LUN 0 of a target of its own. A volume is
// attached while a session uses it; its sessions share one unit.
type volumeTargets struct {
	gateway *gateway.Gateway
	store   meta.Store
	times   *latencies
	server  *iscsi.Server

	mu    sync.Mutex
	units map[block.VolumeID]*sharedUnit
}

// sharedUnit is the unit of a volume that is in use. The targets' mu guards uses.
type sharedUnit struct {
	handle *gateway.Handle
	unit   *scsi.Unit
	uses   int
}

// List implements iscsi.Targets.
func (v *volumeTargets) List(ctx context.Context, _ iscsi.Initiator) ([]string, error) {
	all, err := v.gateway.List(ctx)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(all))
	for i, g := range all {
		names[i] = iscsi.NamePrefix + g.Name
	}
	return names, nil
}

func volumeOf(target string) (string, error) {
	name, ok := strings.CutPrefix(target, iscsi.NamePrefix)
	if !ok {
		return "", block.Errorf(block.NotFound, "there is no target %.223q", target)
	}
	return name, nil
}

// Access implements iscsi.Targets.
func (v *volumeTargets) Access(ctx context.Context, target string, _ iscsi.Initiator) (iscsi.Access, error) {
	if target == "" {
		return iscsi.Access{}, nil
	}
	name, err := volumeOf(target)
	if err == nil {
		_, err = v.gateway.Find(ctx, name)
	}
	return iscsi.Access{}, err
}

// Open implements iscsi.Targets.
func (v *volumeTargets) Open(ctx context.Context, target string, _ iscsi.Initiator) (*iscsi.Target, error) {
	name, err := volumeOf(target)
	if err != nil {
		return nil, err
	}
	h, err := v.gateway.Open(ctx, name)
	if err != nil {
		return nil, err
	}
	u, err := v.share(ctx, h)
	if err != nil {
		h.Release()
		return nil, err
	}
	return &iscsi.Target{Name: target, LUNs: []iscsi.LUN{{Number: 0, Unit: u.unit}}, Close: func() { v.release(u) }}, nil
}

// share gives the unit of the volume that h uses, and takes over h.
func (v *volumeTargets) share(ctx context.Context, h *gateway.Handle) (*sharedUnit, error) {
	id := h.Geometry().ID
	v.mu.Lock()
	defer v.mu.Unlock()
	u := v.units[id]
	// An attachment that ended is not the one that h is of.
	if u != nil && u.handle.Volume == h.Volume {
		u.uses++
		h.Release()
		return u, nil
	}
	d := &attached{Volume: h.Volume}
	unit, err := scsi.NewUnit(ctx, scsi.Config{Device: timed{d, v.times}, Revision: "1", Store: reservationStore{v.store, id}})
	if err != nil {
		return nil, err
	}
	unit.Abort = func(by *scsi.Nexus, match func(*scsi.Nexus) bool) { v.server.AbortTasks(unit, by, match) }
	d.over = func() { v.server.Leave(unit) }
	u = &sharedUnit{handle: h, unit: unit, uses: 1}
	v.units[id] = u
	return u, nil
}

func (v *volumeTargets) release(u *sharedUnit) {
	v.mu.Lock()
	u.uses--
	last := u.uses == 0
	if id := u.handle.Geometry().ID; last && v.units[id] == u {
		delete(v.units, id)
	}
	v.mu.Unlock()
	if last {
		u.unit.Close()
		u.handle.Release()
	}
}

// disconnect ends the sessions of a volume and returns how many when their tasks
// have ended, or ctx has. v may be nil: there is no iSCSI here.
func (v *volumeTargets) disconnect(ctx context.Context, id block.VolumeID) (int, error) {
	if v == nil {
		return 0, nil
	}
	v.mu.Lock()
	u := v.units[id]
	v.mu.Unlock()
	if u == nil {
		return 0, nil
	}
	return v.server.Disconnect(ctx, u.unit)
}

// attached is a volume whose sessions end with its attachment: the initiators
// come back, and find the volume here again or at the gateway that has it now.
type attached struct {
	*gateway.Volume
	over func()
}

// note ends the sessions if the error says that the attachment is over: another
// gateway took the volume, or it was detached here. Without an end of ctx nothing
// else is the kind Canceled.
func (a *attached) note(ctx context.Context, err error) error {
	switch {
	case err == nil:
	case block.KindOf(err) == block.Fenced, block.KindOf(err) == block.Canceled && ctx.Err() == nil:
		a.over()
	}
	return err
}

// ReadAt implements block.Device.
func (a *attached) ReadAt(ctx context.Context, p []byte, off int64) error {
	return a.note(ctx, a.Volume.ReadAt(ctx, p, off))
}

// WriteAt implements block.Device.
func (a *attached) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	return a.note(ctx, a.Volume.WriteAt(ctx, p, off, f))
}

// Flush implements block.Device.
func (a *attached) Flush(ctx context.Context) error {
	return a.note(ctx, a.Volume.Flush(ctx))
}

// Trim implements block.Device.
func (a *attached) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	return a.note(ctx, a.Volume.Trim(ctx, off, n, f))
}

// WriteZeroes implements block.Device.
func (a *attached) WriteZeroes(ctx context.Context, off, n int64, f block.Flags) error {
	return a.note(ctx, a.Volume.WriteZeroes(ctx, off, n, f))
}

// Extents implements block.Device.
func (a *attached) Extents(ctx context.Context, dst []block.Extent, off, n int64, limit int) ([]block.Extent, error) {
	dst, err := a.Volume.Extents(ctx, dst, off, n, limit)
	return dst, a.note(ctx, err)
}

// reservationStore keeps a volume's persistent reservations in the cluster's
// metadata: a scsi.Store.
type reservationStore struct {
	store meta.Store
	id    block.VolumeID
}

// Load implements scsi.Store.
func (r reservationStore) Load(ctx context.Context) ([]byte, int64, error) {
	text, at, err := meta.Reservations(ctx, r.store, r.id)
	return text, int64(at), err
}

// Save implements scsi.Store.
func (r reservationStore) Save(ctx context.Context, text []byte, version int64) (int64, error) {
	at, err := meta.PutReservations(ctx, r.store, r.id, text, meta.Revision(version))
	return int64(at), err
}

var (
	iscsiSessions   = describe("iscsi_sessions", "iSCSI sessions.")
	iscsiLogins     = describe("iscsi_logins_total", "Logins, by result.", "result")
	iscsiCommands   = describe("iscsi_commands_total", "SCSI commands.")
	iscsiInline     = describe("iscsi_inline_total", "Commands answered from memory at once.")
	iscsiConditions = describe("iscsi_conditions_total", "Commands that ended in another status than GOOD.")
	iscsiBytes      = describe("iscsi_bytes_total", "Bytes of data, as the initiator sees them.", "direction")
	iscsiAborted    = describe("iscsi_aborted_total", "Tasks ended by task management.")
	iscsiRejected   = describe("iscsi_rejected_total", "PDUs answered with Reject.")
)

// iscsiMetrics are those of an iSCSI server, which may be nil.
func iscsiMetrics(server *iscsi.Server) collector {
	return func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		if server == nil {
			return
		}
		s := server.Stats()
		emit(iscsiSessions, prometheus.GaugeValue, float64(s.Sessions))
		emit(iscsiLogins, prometheus.CounterValue, float64(s.Logins), "ok")
		emit(iscsiLogins, prometheus.CounterValue, float64(s.FailedLogins), "failed")
		emit(iscsiCommands, prometheus.CounterValue, float64(s.Commands))
		emit(iscsiInline, prometheus.CounterValue, float64(s.Inline))
		emit(iscsiConditions, prometheus.CounterValue, float64(s.Conditions))
		emit(iscsiBytes, prometheus.CounterValue, float64(s.InBytes), "in")
		emit(iscsiBytes, prometheus.CounterValue, float64(s.OutBytes), "out")
		emit(iscsiAborted, prometheus.CounterValue, float64(s.Aborted))
		emit(iscsiRejected, prometheus.CounterValue, float64(s.Rejected))
	}
}

// Package iscsi is an iSCSI target (RFC 7143): logins, sessions and tasks around
// the units of package scsi. It serves one connection per session
// (MaxConnections 1) at ErrorRecoveryLevel 0: what goes wrong on the wire ends the
// session, and the initiator comes back.
//
// A connection has one goroutine that reads. It parses requests in place, runs
// reads that memory answers itself, and hands the rest to workers, of which a
// session has a bounded number; whoever finds the connection idle writes out
// what is ready. The limits of Options bound what a session holds: commands by
// the CmdSN window, data by SessionBytes. Data of a write is asked for (R2T) when
// there is room for it, so a reader never waits for what it alone could bring.
//
// A session ends, for its successor and for whoever waits for an abort, when none
// of its tasks can touch storage any more.
package iscsi

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"firn.io/firn/iscsi/scsi"
)

// DefaultPort is the port that IANA gave to iSCSI.
const DefaultPort = "3260"

// NamePrefix is what the names of targets begin with.
const NamePrefix = "iqn.2026-11.io.firn:"

// Initiator is who asks: its name as it claims it (until CHAP has proved it),
// and where it comes from.
type Initiator struct {
	Name string
	Addr netip.AddrPort
}

// Account is a CHAP name and its secret.
type Account struct{ Name, Secret string }

// Access is how an initiator proves itself.
type Access struct {
	// Accounts are who may enter; with none, nobody is asked.
	Accounts []Account
	// Mutual, if set, is how the target proves itself to initiators that ask.
	Mutual *Account
}

// Targets is what a Server serves. All methods may be called by many goroutines
// at once. Errors have kinds: NotFound, Denied, Busy, Unavailable.
type Targets interface {
	// List tells the names of the targets that the initiator may see.
	List(ctx context.Context, who Initiator) ([]string, error)
	// Access tells how the initiator enters the target, or discovery if target is
	// empty. It opens nothing.
	Access(ctx context.Context, target string, who Initiator) (Access, error)
	// Open enters the target, once for each session.
	Open(ctx context.Context, target string, who Initiator) (*Target, error)
}

// Target is an entered target.
type Target struct {
	Name string
	// LUNs are its units, in ascending order of their numbers.
	LUNs []LUN
	// Close ends the use; the session has detached from the units.
	Close func()
}

// LUN is a unit and its number, at most scsi.MaxLUN.
type LUN struct {
	Number uint16
	Unit   *scsi.Unit
}

// Options of a Server. Zero fields take their defaults.
type Options struct {
	// Portals are the addresses that discovery tells, "host:port"; without any it
	// tells the address that the initiator came to.
	Portals []string
	// Tag is the target portal group tag, and the SCSI target port group and
	// relative port; gateways of one cluster have different ones. Default 1.
	Tag uint16
	// MaxSessions bounds the sessions, and connections in login beside them. 256.
	MaxSessions int
	// QueueDepth bounds the commands of a session that are not answered. 128.
	QueueDepth int
	// SessionBytes bounds the data of a session that is in memory, without
	// unsolicited data, which QueueDepth and FirstBurst bound. 16 MiB.
	SessionBytes int64
	// LoginTimeout bounds a login, 15 s. OpenTimeout what entering a target may
	// take within it, 10 s.
	LoginTimeout, OpenTimeout time.Duration
	// StallTimeout bounds the middle of a message either way, 30 s. After
	// PingInterval of silence, 20 s, the initiator is asked whether it is there.
	StallTimeout, PingInterval time.Duration
	Log                        *slog.Logger
	// Now is the time; tests replace it.
	Now func() time.Time
}

func (o Options) withDefaults() Options {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if o.Tag == 0 {
		o.Tag = 1
	}
	if o.MaxSessions == 0 {
		o.MaxSessions = 256
	}
	if o.QueueDepth == 0 {
		o.QueueDepth = 128
	}
	if o.SessionBytes == 0 {
		o.SessionBytes = 16 << 20
	}
	def(&o.LoginTimeout, 15*time.Second)
	def(&o.OpenTimeout, 10*time.Second)
	def(&o.StallTimeout, 30*time.Second)
	def(&o.PingInterval, 20*time.Second)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

// What this target offers in the operational negotiation.
const (
	ourRecvSegment  = 256 << 10
	ourFirstBurst   = 64 << 10
	ourMaxBurst     = 1 << 20
	ourOutstanding  = 4
	defaultSegment  = 8192
	workersPerQueue = 32
)

// Stats is what happened to a Server until now.
type Stats struct {
	// Accepted connections, Refused ones, Logins that succeeded and that failed.
	Accepted, Refused, Logins, FailedLogins uint64
	// Commands and their bytes, of data in and out.
	Commands, InBytes, OutBytes uint64
	// Inline are commands that memory answered; Conditions those that ended in
	// another status than GOOD.
	Inline, Conditions uint64
	// Aborted tasks, Rejected PDUs.
	Aborted, Rejected uint64
	Sessions          int
}

// SessionInfo describes a session to people.
type SessionInfo struct {
	TSIH      uint16
	Initiator string
	Addr      string
	Target    string
	Since     time.Time
	Commands  uint64
	InFlight  int
}

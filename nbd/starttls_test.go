package nbd_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/client"
	"firn.io/firn/nbd/device"
	"firn.io/firn/nbd/nbdtest"
	"firn.io/firn/nbd/wire"
)

// authority signs certificates for a test.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, pool: x509.NewCertPool()}
	pair := a.sign("authority", true)
	a.cert, a.key = pair.Leaf, pair.PrivateKey.(*ecdsa.PrivateKey)
	a.pool.AddCert(a.cert)
	return a
}

// sign makes a certificate for name, valid for 127.0.0.1 and localhost.
func (a *authority) sign(name string, ca bool) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IsCA: ca, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := a.cert, a.key
	if ca {
		parent, signer = template, key
		template.ExtKeyUsage = nil
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// save writes a certificate and its key as PEM, as gnutls' users name them.
func save(t testing.TB, dir, name string, pair tls.Certificate) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for suffix, b := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: pair.Certificate[0]}, "key.pem": {Type: "PRIVATE KEY", Bytes: key}} {
		if err := os.WriteFile(filepath.Join(dir, name+"-"+suffix), pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func (a *authority) server() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{a.sign("server", false)}}
}

func (a *authority) client(name string) *tls.Config {
	c := &tls.Config{RootCAs: a.pool, ServerName: "localhost"}
	if name != "" {
		c.Certificates = []tls.Certificate{a.sign(name, false)}
	}
	return c
}

// startTLS goes on under TLS.
func (r *raw) startTLS(c *tls.Config) {
	r.t.Helper()
	r.wantAck(wire.OptStartTLS, nil)
	nc := tls.Client(r.nc, c)
	if err := nc.Handshake(); err != nil {
		r.t.Fatal(err)
	}
	r.nc = nc
}

func TestTLSRequired(t *testing.T) {
	a := newAuthority(t)
	c := newCatalog("vol")
	addr, s := serve(t, c, nbd.Options{TLS: a.server(), RequireTLS: true})
	r := rawDial(t, addr, rawFlags)
	for _, o := range []wire.Option{wire.OptList, wire.OptInfo, wire.OptGo, wire.OptStructuredReply, wire.OptExtendedHeaders, wire.OptSetMetaContext,
		wire.OptListMetaContext, wire.OptSession, 12345} {
		r.wantRefusal(o, wire.AppendInfoRequest(nil, "vol"), wire.RepErrTLSRequired)
	}
	r.wantRefusal(wire.OptStartTLS, []byte{1}, wire.RepErrInvalid)
	r.startTLS(a.client(""))
	r.wantRefusal(wire.OptStartTLS, nil, wire.RepErrInvalid)
	r.enter("vol", true)
	r.alive()
	if st := s.Stats(); st.Encrypted != 1 {
		t.Errorf("%+v", st)
	}
	r = rawDial(t, addr, rawFlags)
	r.wantAck(wire.OptAbort, nil)
	r.wantClosed()
	r = rawDial(t, addr, rawFlags)
	r.send(wire.AppendOption(nil, wire.OptExportName, []byte("vol")))
	r.wantClosed()
	if c.opens.Load() != 1 {
		t.Errorf("%d exports opened", c.opens.Load())
	}
}

// TestTLSForgets: what was agreed on in the clear, by whomever, is gone.
func TestTLSForgets(t *testing.T) {
	a := newAuthority(t)
	addr, _ := serve(t, newCatalog("vol"), nbd.Options{TLS: a.server()})
	for _, header := range []wire.Option{wire.OptStructuredReply, wire.OptExtendedHeaders} {
		r := rawDial(t, addr, rawFlags)
		r.wantAck(header, nil)
		r.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, 9)))
		r.wantAck(wire.OptSetMetaContext, wire.AppendMetaRequest(nil, "vol", wire.BaseAllocation))
		r.startTLS(a.client(""))
		r.wantRefusal(wire.OptSetMetaContext, wire.AppendMetaRequest(nil, "vol", wire.BaseAllocation), wire.RepErrInvalid)
		for _, answer := range r.wantAck(wire.OptGo, wire.AppendInfoRequest(nil, "vol")) {
			if i, err := wire.ParseInfoReply(answer.data); err != nil || i.Type == wire.InfoExport && i.Flags&wire.SendDF != 0 {
				t.Errorf("%+v, %v", i, err)
			}
		}
		r.wantErrno(0, wire.CmdRead, 0, 0, 0, nil)
		r.wantErrno(wire.EINVAL, wire.CmdBlockStatus, 0, 0, 512, nil)
		// The session of the clear text is not the client's.
		other := rawDial(t, addr, rawFlags)
		other.wantAck(wire.OptSession, wire.AppendSession(nil, sessionOf(1, 0, 1)))
		other.enter("vol", false)
		other.alive()
		r.alive()
	}
}

// TestTLSInjection: what somebody put behind STARTTLS is not taken for the
// client's, and garbage in place of TLS ends the connection.
func TestTLSInjection(t *testing.T) {
	a := newAuthority(t)
	addr, s := serve(t, newCatalog("vol"), nbd.Options{TLS: a.server()})
	r := rawDial(t, addr, rawFlags)
	r.send(append(wire.AppendOption(nil, wire.OptStartTLS, nil), wire.AppendOption(nil, wire.OptStructuredReply, nil)...))
	if answer := r.answer(wire.OptStartTLS); answer.reply != wire.RepAck {
		t.Errorf("%+v", answer)
	}
	r.wantClosed()
	r = rawDial(t, addr, rawFlags)
	r.wantAck(wire.OptStartTLS, nil)
	r.send(wire.AppendOption(nil, wire.OptGo, wire.AppendInfoRequest(nil, "vol")))
	r.nc.(*net.UnixConn).CloseWrite()
	for s.Stats().HandshakeFailures != 2 {
		runtime.Gosched()
	}
}

// certified lets a client enter only the export that its certificate names.
type certified struct{ *catalog }

func (c certified) Open(ctx context.Context, name string) (*nbd.Export, error) {
	who, _ := nbd.ClientOf(ctx)
	switch {
	case who.TLS == nil:
		return nil, nbd.ErrTLSRequired
	case who.TLS.PeerCertificates[0].Subject.CommonName != name:
		return nil, block.Errorf(block.Denied, "%q is not yours", name)
	}
	return c.catalog.Open(ctx, name)
}

// TestTLSClientCertificates: without one the connection ends, and Exports are
// told whose it is.
func TestTLSClientCertificates(t *testing.T) {
	a := newAuthority(t)
	config := a.server()
	config.ClientCAs, config.ClientAuth = a.pool, tls.RequireAndVerifyClientCert
	c := newCatalog("alice", "bob")
	addr, _ := serve(t, certified{c}, nbd.Options{TLS: config})
	stranger := newAuthority(t).client("alice")
	stranger.RootCAs = a.pool
	for _, config := range []*tls.Config{a.client(""), stranger} {
		if _, err := client.Dial(t.Context(), addr, client.Options{Export: "alice", TLS: config}); err == nil {
			t.Errorf("entered without a certificate")
		}
	}
	r := rawDial(t, addr, rawFlags)
	r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "alice"), wire.RepErrTLSRequired)
	r.startTLS(a.client("alice"))
	r.wantRefusal(wire.OptGo, wire.AppendInfoRequest(nil, "bob"), wire.RepErrPolicy)
	r.enter("alice", true)
	r.alive()
	if c.opens.Load() != 1 {
		t.Errorf("%d exports opened", c.opens.Load())
	}
}

// TestTLSConformance runs the suite of block.Device under TLS.
func TestTLSConformance(t *testing.T) {
	a := newAuthority(t)
	blocktest.Run(t, func(t testing.TB, size int64) block.Device {
		addr, _ := serve(t, nbd.Fixed{*device.Export(blocktest.New(blocktest.Options{Bytes: size}), nil)}, nbd.Options{TLS: a.server(), RequireTLS: true})
		return nbdtest.New(dial(t, addr, client.Options{TLS: a.client("")}))
	})
}

// TestTLSTakeover: a session under TLS is ended like another.
func TestTLSTakeover(t *testing.T) {
	a := newAuthority(t)
	d, exports := newVolume(blocktest.Options{})
	addr, s := serve(t, exports, nbd.Options{TLS: a.server()})
	old := dial(t, addr, client.Options{TLS: a.client(""), Session: sessionOf(1, 0, 1)})
	data := bytes.Repeat([]byte{7}, 1<<20)
	if err := old.Do(t.Context(), &client.Call{Command: wire.CmdWrite, Data: data}); err != nil {
		t.Fatal(err)
	}
	again := dial(t, addr, client.Options{TLS: a.client(""), Session: sessionOf(1, 0, 2)})
	got := make([]byte, len(data))
	if err := again.Do(t.Context(), &client.Call{Command: wire.CmdRead, Data: got}); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read back: %v", err)
	}
	if err := old.Do(t.Context(), &client.Call{Command: wire.CmdFlush}); err == nil {
		t.Errorf("the old connection lives")
	}
	if st := s.Stats(); st.Superseded != 1 || st.Encrypted != 2 {
		t.Errorf("%+v", st)
	}
	if err := again.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if d.Lent() != 0 {
		t.Errorf("%d loans left", d.Lent())
	}
}

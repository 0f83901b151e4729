SELECT pg_catalog.set_config('search_path', '', false);
CREATE TYPE public.studydirection AS ENUM (
    'NOT_SET',
    'MINIMIZE',
    'MAXIMIZE'
);
CREATE TYPE public.trialintermediatevaluetype AS ENUM (
    'FINITE',
    'INF_POS',
    'INF_NEG',
    'NAN'
);
CREATE TYPE public.trialstate AS ENUM (
    'RUNNING',
    'COMPLETE',
    'PRUNED',
    'FAIL',
    'WAITING'
);
CREATE TYPE public.trialvaluetype AS ENUM (
    'FINITE',
    'INF_POS',
    'INF_NEG'
);
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.studies (
    study_id integer NOT NULL,
    study_name character varying(512) NOT NULL
);
CREATE SEQUENCE public.studies_study_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.studies_study_id_seq OWNED BY public.studies.study_id;
CREATE TABLE public.study_directions (
    study_direction_id integer NOT NULL,
    direction public.studydirection NOT NULL,
    study_id integer NOT NULL,
    objective integer NOT NULL
);
CREATE SEQUENCE public.study_directions_study_direction_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.study_directions_study_direction_id_seq OWNED BY public.study_directions.study_direction_id;
CREATE TABLE public.study_system_attributes (
    study_system_attribute_id integer NOT NULL,
    study_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.study_system_attributes_study_system_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.study_system_attributes_study_system_attribute_id_seq OWNED BY public.study_system_attributes.study_system_attribute_id;
CREATE TABLE public.study_user_attributes (
    study_user_attribute_id integer NOT NULL,
    study_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.study_user_attributes_study_user_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.study_user_attributes_study_user_attribute_id_seq OWNED BY public.study_user_attributes.study_user_attribute_id;
CREATE TABLE public.trial_heartbeats (
    trial_heartbeat_id integer NOT NULL,
    trial_id integer NOT NULL,
    heartbeat timestamp without time zone NOT NULL
);
CREATE SEQUENCE public.trial_heartbeats_trial_heartbeat_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_heartbeats_trial_heartbeat_id_seq OWNED BY public.trial_heartbeats.trial_heartbeat_id;
CREATE TABLE public.trial_intermediate_values (
    trial_intermediate_value_id integer NOT NULL,
    trial_id integer NOT NULL,
    step integer NOT NULL,
    intermediate_value double precision,
    intermediate_value_type public.trialintermediatevaluetype NOT NULL
);
CREATE SEQUENCE public.trial_intermediate_values_trial_intermediate_value_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_intermediate_values_trial_intermediate_value_id_seq OWNED BY public.trial_intermediate_values.trial_intermediate_value_id;
CREATE TABLE public.trial_params (
    param_id integer NOT NULL,
    trial_id integer,
    param_name character varying(512),
    param_value double precision,
    distribution_json text
);
CREATE SEQUENCE public.trial_params_param_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_params_param_id_seq OWNED BY public.trial_params.param_id;
CREATE TABLE public.trial_system_attributes (
    trial_system_attribute_id integer NOT NULL,
    trial_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.trial_system_attributes_trial_system_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_system_attributes_trial_system_attribute_id_seq OWNED BY public.trial_system_attributes.trial_system_attribute_id;
CREATE TABLE public.trial_user_attributes (
    trial_user_attribute_id integer NOT NULL,
    trial_id integer,
    key character varying(512),
    value_json text
);
CREATE SEQUENCE public.trial_user_attributes_trial_user_attribute_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_user_attributes_trial_user_attribute_id_seq OWNED BY public.trial_user_attributes.trial_user_attribute_id;
CREATE TABLE public.trial_values (
    trial_value_id integer NOT NULL,
    trial_id integer NOT NULL,
    objective integer NOT NULL,
    value double precision,
    value_type public.trialvaluetype NOT NULL
);
CREATE SEQUENCE public.trial_values_trial_value_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trial_values_trial_value_id_seq OWNED BY public.trial_values.trial_value_id;
CREATE TABLE public.trials (
    trial_id integer NOT NULL,
    number integer,
    study_id integer,
    state public.trialstate NOT NULL,
    datetime_start timestamp without time zone,
    datetime_complete timestamp without time zone
);
CREATE SEQUENCE public.trials_trial_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.trials_trial_id_seq OWNED BY public.trials.trial_id;
CREATE TABLE public.tuner_attempts (
    study_id integer NOT NULL,
    number integer NOT NULL,
    attempt integer NOT NULL,
    worker_id integer NOT NULL,
    claimed_at double precision NOT NULL,
    released_at double precision,
    outcome character varying(32)
);
CREATE TABLE public.tuner_measurements (
    study_id integer NOT NULL,
    number integer NOT NULL,
    step integer NOT NULL,
    attempt integer NOT NULL,
    elapsed_s double precision NOT NULL,
    metrics text NOT NULL
);
CREATE TABLE public.tuner_notifications (
    study_id integer NOT NULL,
    event character varying(32) NOT NULL,
    key character varying(64) NOT NULL,
    claimed_at double precision NOT NULL,
    sent_at double precision
);
CREATE TABLE public.tuner_runs (
    study_id integer NOT NULL,
    number integer NOT NULL,
    arm character varying(255) NOT NULL,
    config text,
    attempt integer NOT NULL,
    checkpoint_attempt integer,
    checkpoint_step integer,
    best_step integer,
    ended_at double precision,
    failure text,
    measured_at double precision,
    uploaded_attempt integer,
    uploaded_step integer,
    curves text
);
CREATE TABLE public.tuner_schema (
    version integer NOT NULL
);
CREATE TABLE public.tuner_studies (
    id integer NOT NULL,
    name character varying(255) NOT NULL,
    spec text NOT NULL,
    data text NOT NULL,
    package_version character varying(64) NOT NULL,
    n_trials integer NOT NULL,
    n_replacements integer DEFAULT 0 NOT NULL,
    created_at double precision NOT NULL,
    started_at double precision NOT NULL,
    queued_at double precision,
    stop character varying(16)
);
CREATE SEQUENCE public.tuner_studies_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.tuner_studies_id_seq OWNED BY public.tuner_studies.id;
CREATE TABLE public.tuner_workers (
    id integer NOT NULL,
    study_id integer,
    host character varying(255) NOT NULL,
    boot character varying(255) NOT NULL,
    pid integer NOT NULL,
    process_start bigint NOT NULL,
    device character varying(64) NOT NULL,
    started_at double precision NOT NULL,
    renewed_at double precision NOT NULL,
    ended_at double precision
);
CREATE SEQUENCE public.tuner_workers_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.tuner_workers_id_seq OWNED BY public.tuner_workers.id;
CREATE TABLE public.version_info (
    version_info_id integer NOT NULL,
    schema_version integer,
    library_version character varying(256),
    CONSTRAINT version_info_version_info_id_check CHECK ((version_info_id = 1))
);
ALTER TABLE ONLY public.studies ALTER COLUMN study_id SET DEFAULT nextval('public.studies_study_id_seq'::regclass);
ALTER TABLE ONLY public.study_directions ALTER COLUMN study_direction_id SET DEFAULT nextval('public.study_directions_study_direction_id_seq'::regclass);
ALTER TABLE ONLY public.study_system_attributes ALTER COLUMN study_system_attribute_id SET DEFAULT nextval('public.study_system_attributes_study_system_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.study_user_attributes ALTER COLUMN study_user_attribute_id SET DEFAULT nextval('public.study_user_attributes_study_user_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.trial_heartbeats ALTER COLUMN trial_heartbeat_id SET DEFAULT nextval('public.trial_heartbeats_trial_heartbeat_id_seq'::regclass);
ALTER TABLE ONLY public.trial_intermediate_values ALTER COLUMN trial_intermediate_value_id SET DEFAULT nextval('public.trial_intermediate_values_trial_intermediate_value_id_seq'::regclass);
ALTER TABLE ONLY public.trial_params ALTER COLUMN param_id SET DEFAULT nextval('public.trial_params_param_id_seq'::regclass);
ALTER TABLE ONLY public.trial_system_attributes ALTER COLUMN trial_system_attribute_id SET DEFAULT nextval('public.trial_system_attributes_trial_system_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.trial_user_attributes ALTER COLUMN trial_user_attribute_id SET DEFAULT nextval('public.trial_user_attributes_trial_user_attribute_id_seq'::regclass);
ALTER TABLE ONLY public.trial_values ALTER COLUMN trial_value_id SET DEFAULT nextval('public.trial_values_trial_value_id_seq'::regclass);
ALTER TABLE ONLY public.trials ALTER COLUMN trial_id SET DEFAULT nextval('public.trials_trial_id_seq'::regclass);
ALTER TABLE ONLY public.tuner_studies ALTER COLUMN id SET DEFAULT nextval('public.tuner_studies_id_seq'::regclass);
ALTER TABLE ONLY public.tuner_workers ALTER COLUMN id SET DEFAULT nextval('public.tuner_workers_id_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('v3.2.0.a');
INSERT INTO public.studies VALUES (1, 'toy');
INSERT INTO public.study_directions VALUES (1, 'MAXIMIZE', 1, 0);
INSERT INTO public.trial_intermediate_values VALUES (1, 1, 0, 0.030865610451267827, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (2, 1, 1, 0.04958654952070845, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (3, 1, 2, 0.06094137304493629, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (4, 1, 3, 0.06782842164800673, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (5, 1, 4, 0.07200562778070001, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (6, 2, 0, 0.020331454111931515, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (7, 2, 1, 0.035393365771004624, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (8, 2, 2, 0.046551504366344365, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (9, 2, 3, 0.054817656746663966, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (10, 2, 4, 0.06094137304493629, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (11, 3, 0, 0.08289372882151821, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (12, 4, 0, 0.12988141309318332, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (13, 4, 1, 0.2260999304405026, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (14, 4, 2, 0.2973803612583766, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (15, 4, 3, 0.35018620318630034, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (16, 4, 4, 0.3893057330449449, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (17, 5, 0, 0.10954885375691441, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (18, 5, 1, 0.17599359229685851, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (19, 5, 2, 0.21629436339792427, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (20, 5, 3, 0.24073801668078146, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (21, 5, 4, 0.25556384183221975, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (22, 6, 0, 0.06565059179799891, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (23, 6, 1, 0.11428574640049426, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (24, 6, 2, 0.15031555509569508, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (25, 7, 0, 0.32951461883836514, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (26, 8, 0, 0.12523392463449315, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (27, 9, 0, 0.2152837528081944, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (28, 10, 0, 0.12946211549001727, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (29, 10, 1, 0.22537000953302294, 'FINITE');
INSERT INTO public.trial_intermediate_values VALUES (30, 10, 2, 0.29642032494729303, 'FINITE');
INSERT INTO public.trial_params VALUES (1, 1, 'fault', 0, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (2, 1, 'x', 0.9, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (3, 1, 'y', 0.1, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (4, 2, 'fault', 0, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (5, 2, 'x', 0.9, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (6, 2, 'y', 0.1, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (7, 3, 'fault', 2, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (8, 3, 'x', 0.008959321591294533, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (9, 3, 'y', 0.07244324569964056, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (10, 4, 'fault', 0, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (11, 4, 'x', 0.6737212196480591, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (12, 4, 'y', 0.6819712194651905, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (13, 5, 'fault', 0, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (14, 5, 'x', 0.7748760973883675, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (15, 5, 'y', 0.339595123181789, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (16, 6, 'fault', 0, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (17, 6, 'x', 0.23901498734377957, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (18, 6, 'y', 0.04032468155939406, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (19, 7, 'fault', 2, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (20, 7, 'x', 0.32752307087394067, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (21, 7, 'y', 0.7313314855098421, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (22, 8, 'fault', 2, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (23, 8, 'x', 0.4422186351684851, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (24, 8, 'y', 0.9677911106376883, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (25, 9, 'fault', 2, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (26, 9, 'x', 0.5617531587946086, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (27, 9, 'y', 0.8364459931544513, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_params VALUES (28, 10, 'fault', 1, '{"name": "CategoricalDistribution", "attributes": {"choices": ["none", "other", "raise"]}}');
INSERT INTO public.trial_params VALUES (29, 10, 'x', 0.1701878431838033, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}');
INSERT INTO public.trial_params VALUES (30, 10, 'y', 0.9610318796238411, '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.01, "high": 1.0, "log": true}}');
INSERT INTO public.trial_system_attributes VALUES (1, 1, 'constraints:violation', '-0.1');
INSERT INTO public.trial_system_attributes VALUES (2, 2, 'constraints:violation', '-0.1');
INSERT INTO public.trial_system_attributes VALUES (3, 4, 'constraints:violation', '-0.1');
INSERT INTO public.trial_system_attributes VALUES (4, 5, 'constraints:violation', '-0.1');
INSERT INTO public.trial_system_attributes VALUES (5, 6, 'tpe:relative_params:0', '"{\"fault\": \"none\", \"x\": 0.23901498734377957, \"y\": 0.04032468155939406}"');
INSERT INTO public.trial_system_attributes VALUES (6, 6, 'constraints:violation', '-0.1');
INSERT INTO public.trial_system_attributes VALUES (7, 7, 'tpe:relative_params:0', '"{\"fault\": \"raise\", \"x\": 0.32752307087394067, \"y\": 0.7313314855098421}"');
INSERT INTO public.trial_system_attributes VALUES (8, 8, 'tpe:relative_params:0', '"{\"fault\": \"raise\", \"x\": 0.4422186351684851, \"y\": 0.9677911106376883}"');
INSERT INTO public.trial_system_attributes VALUES (9, 9, 'tpe:relative_params:0', '"{\"fault\": \"raise\", \"x\": 0.5617531587946086, \"y\": 0.8364459931544513}"');
INSERT INTO public.trial_system_attributes VALUES (10, 10, 'tpe:relative_params:0', '"{\"fault\": \"other\", \"x\": 0.1701878431838033, \"y\": 0.9610318796238411}"');
INSERT INTO public.trial_user_attributes VALUES (1, 1, 'arm', '"a"');
INSERT INTO public.trial_user_attributes VALUES (2, 2, 'arm', '"b"');
INSERT INTO public.trial_user_attributes VALUES (3, 3, 'arm', '"a"');
INSERT INTO public.trial_user_attributes VALUES (4, 4, 'arm', '"b"');
INSERT INTO public.trial_user_attributes VALUES (5, 5, 'arm', '"a"');
INSERT INTO public.trial_user_attributes VALUES (6, 6, 'arm', '"b"');
INSERT INTO public.trial_user_attributes VALUES (7, 7, 'arm', '"a"');
INSERT INTO public.trial_user_attributes VALUES (8, 8, 'arm', '"b"');
INSERT INTO public.trial_user_attributes VALUES (9, 9, 'arm', '"a"');
INSERT INTO public.trial_user_attributes VALUES (10, 10, 'arm', '"b"');
INSERT INTO public.trial_values VALUES (1, 1, 0, 0.07200562778070001, 'FINITE');
INSERT INTO public.trial_values VALUES (2, 2, 0, 0.06094137304493629, 'FINITE');
INSERT INTO public.trial_values VALUES (3, 4, 0, 0.3893057330449449, 'FINITE');
INSERT INTO public.trial_values VALUES (4, 5, 0, 0.25556384183221975, 'FINITE');
INSERT INTO public.trial_values VALUES (5, 6, 0, 0.15031555509569508, 'FINITE');
INSERT INTO public.trials VALUES (1, 0, 1, 'COMPLETE', '2026-11-21 14:01:37.736977', '2026-11-21 14:01:38.479485');
INSERT INTO public.trials VALUES (2, 1, 1, 'COMPLETE', '2026-11-21 14:01:38.689387', '2026-11-21 14:01:39.473001');
INSERT INTO public.trials VALUES (3, 2, 1, 'FAIL', '2026-11-21 14:01:39.609075', '2026-11-21 14:01:40.008177');
INSERT INTO public.trials VALUES (4, 3, 1, 'COMPLETE', '2026-11-21 14:01:40.237562', '2026-11-21 14:01:40.994707');
INSERT INTO public.trials VALUES (5, 4, 1, 'COMPLETE', '2026-11-21 14:01:41.21248', '2026-11-21 14:01:41.783151');
INSERT INTO public.trials VALUES (6, 5, 1, 'PRUNED', '2026-11-21 14:01:41.956957', '2026-11-21 14:01:42.796871');
INSERT INTO public.trials VALUES (7, 6, 1, 'FAIL', '2026-11-21 14:01:43.014312', '2026-11-21 14:01:43.533411');
INSERT INTO public.trials VALUES (8, 7, 1, 'FAIL', '2026-11-21 14:01:43.709854', '2026-11-21 14:01:44.106653');
INSERT INTO public.trials VALUES (9, 8, 1, 'FAIL', '2026-11-21 14:01:44.221863', '2026-11-21 14:01:44.654734');
INSERT INTO public.trials VALUES (10, 9, 1, 'WAITING', '2026-11-21 14:01:44.871033', NULL);
INSERT INTO public.tuner_attempts VALUES (1, 0, 1, 1, 1795269697.896776, 1795269698.531125, 'complete');
INSERT INTO public.tuner_attempts VALUES (1, 1, 1, 1, 1795269698.768548, 1795269699.506036, 'complete');
INSERT INTO public.tuner_attempts VALUES (1, 2, 1, 1, 1795269699.680878, 1795269700.076043, 'failed');
INSERT INTO public.tuner_attempts VALUES (1, 3, 1, 1, 1795269700.348979, 1795269701.08711, 'complete');
INSERT INTO public.tuner_attempts VALUES (1, 4, 1, 1, 1795269701.276082, 1795269701.840638, 'complete');
INSERT INTO public.tuner_attempts VALUES (1, 5, 1, 1, 1795269702.076582, 1795269702.865917, 'pruned');
INSERT INTO public.tuner_attempts VALUES (1, 6, 1, 1, 1795269703.134081, 1795269703.582068, 'failed');
INSERT INTO public.tuner_attempts VALUES (1, 7, 1, 1, 1795269703.775988, 1795269704.147798, 'failed');
INSERT INTO public.tuner_attempts VALUES (1, 8, 1, 1, 1795269704.322284, 1795269704.724646, 'failed');
INSERT INTO public.tuner_attempts VALUES (1, 9, 1, 2, 1795269705.008665, 1795269705.684098, 'stopped');
INSERT INTO public.tuner_measurements VALUES (1, 0, 0, 1, 1, '{"valid/toy/pr_auc": 0.030865610451267827, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 0, 1, 1, 2, '{"valid/toy/pr_auc": 0.04958654952070845, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 0, 2, 1, 3, '{"valid/toy/pr_auc": 0.06094137304493629, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 0, 3, 1, 4, '{"valid/toy/pr_auc": 0.06782842164800673, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 0, 4, 1, 5, '{"valid/toy/pr_auc": 0.07200562778070001, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 1, 0, 1, 1, '{"valid/toy/pr_auc": 0.020331454111931515, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 1, 1, 1, 2, '{"valid/toy/pr_auc": 0.035393365771004624, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 1, 2, 1, 3, '{"valid/toy/pr_auc": 0.046551504366344365, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 1, 3, 1, 4, '{"valid/toy/pr_auc": 0.054817656746663966, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 1, 4, 1, 5, '{"valid/toy/pr_auc": 0.06094137304493629, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 2, 0, 1, 1, '{"valid/toy/pr_auc": 0.08289372882151821, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 3, 0, 1, 1, '{"valid/toy/pr_auc": 0.12988141309318332, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 3, 1, 1, 2, '{"valid/toy/pr_auc": 0.2260999304405026, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 3, 2, 1, 3, '{"valid/toy/pr_auc": 0.2973803612583766, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 3, 3, 1, 4, '{"valid/toy/pr_auc": 0.35018620318630034, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 3, 4, 1, 5, '{"valid/toy/pr_auc": 0.3893057330449449, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 4, 0, 1, 1, '{"valid/toy/pr_auc": 0.10954885375691441, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 4, 1, 1, 2, '{"valid/toy/pr_auc": 0.17599359229685851, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 4, 2, 1, 3, '{"valid/toy/pr_auc": 0.21629436339792427, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 4, 3, 1, 4, '{"valid/toy/pr_auc": 0.24073801668078146, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 4, 4, 1, 5, '{"valid/toy/pr_auc": 0.25556384183221975, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 5, 0, 1, 1, '{"valid/toy/pr_auc": 0.06565059179799891, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 5, 1, 1, 2, '{"valid/toy/pr_auc": 0.11428574640049426, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 5, 2, 1, 3, '{"valid/toy/pr_auc": 0.15031555509569508, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 6, 0, 1, 1, '{"valid/toy/pr_auc": 0.32951461883836514, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 7, 0, 1, 1, '{"valid/toy/pr_auc": 0.12523392463449315, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 8, 0, 1, 1, '{"valid/toy/pr_auc": 0.2152837528081944, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 9, 0, 1, 1, '{"valid/toy/pr_auc": 0.12946211549001727, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 9, 1, 1, 2, '{"valid/toy/pr_auc": 0.22537000953302294, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_measurements VALUES (1, 9, 2, 1, 3, '{"valid/toy/pr_auc": 0.29642032494729303, "valid/toy/pr_auc_se": 0.01, "valid/toy/threshold": 0.0, "valid/toy/precision": 0.5, "valid/toy/precision_bound": 0.4, "valid/toy/recall": 0.2, "valid/toy/violation": -0.1}');
INSERT INTO public.tuner_notifications VALUES (1, 'stalled', '9', 1795269705.720454, 1795269705.737946);
INSERT INTO public.tuner_runs VALUES (1, 9, 'b', '{"x": 0.1701878431838033, "y": 0.9610318796238411, "shape": "b", "n_steps": 5, "violation": -0.1, "fault": "other", "speed": 0.3}', 1, 1, 2, NULL, NULL, NULL, 1795269705.498238, 1, 2, '{"step": 2, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.29642032494729303, 0.5, 0.1], "bound": [0.26677829245256374, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.29642032494729303], "observed": [0.12, 0.29642032494729303], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 8, 'a', '{"x": 0.5617531587946086, "y": 0.8364459931544513, "shape": "a", "n_steps": 5, "violation": -0.1, "fault": "raise"}', 1, 1, 0, NULL, 1795269704.720933, 'RuntimeError: the toy was told to fail', 1795269704.538111, NULL, NULL, '{"step": 0, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.2152837528081944, 0.5, 0.1], "bound": [0.19375537752737496, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.2152837528081944], "observed": [0.12, 0.2152837528081944], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 3, 'b', '{"x": 0.6737212196480591, "y": 0.6819712194651905, "shape": "b", "n_steps": 5, "violation": -0.1, "fault": "none", "speed": 0.3}', 1, 1, 4, 4, 1795269701.084917, NULL, 1795269700.762381, NULL, NULL, '{"step": 4, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.3893057330449449, 0.5, 0.1], "bound": [0.3503751597404504, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.3893057330449449], "observed": [0.12, 0.3893057330449449], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 0, 'a', '{"x": 0.9, "y": 0.1, "shape": "a", "n_steps": 5, "violation": -0.1, "fault": "none"}', 1, 1, 4, 4, 1795269698.53027, NULL, 1795269698.26244, NULL, NULL, '{"step": 4, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.07200562778070001, 0.5, 0.1], "bound": [0.06480506500263, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.07200562778070001], "observed": [0.12, 0.07200562778070001], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 5, 'b', '{"x": 0.23901498734377957, "y": 0.04032468155939406, "shape": "b", "n_steps": 5, "violation": -0.1, "fault": "none", "speed": 0.3}', 1, 1, 2, 2, 1795269702.864994, NULL, 1795269702.507045, NULL, NULL, '{"step": 2, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.15031555509569508, 0.5, 0.1], "bound": [0.13528399958612558, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.15031555509569508], "observed": [0.12, 0.15031555509569508], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 6, 'a', '{"x": 0.32752307087394067, "y": 0.7313314855098421, "shape": "a", "n_steps": 5, "violation": -0.1, "fault": "raise"}', 1, 1, 0, NULL, 1795269703.576861, 'RuntimeError: the toy was told to fail', 1795269703.385495, NULL, NULL, '{"step": 0, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.32951461883836514, 0.5, 0.1], "bound": [0.2965631569545286, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.32951461883836514], "observed": [0.12, 0.32951461883836514], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 1, 'b', '{"x": 0.9, "y": 0.1, "shape": "b", "n_steps": 5, "violation": -0.1, "fault": "none", "speed": 0.3}', 1, 1, 4, 4, 1795269699.505411, NULL, 1795269699.25278, NULL, NULL, '{"step": 4, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.06094137304493629, 0.5, 0.1], "bound": [0.05484723574044266, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.06094137304493629], "observed": [0.12, 0.06094137304493629], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 4, 'a', '{"x": 0.7748760973883675, "y": 0.339595123181789, "shape": "a", "n_steps": 5, "violation": -0.1, "fault": "none"}', 1, 1, 4, 4, 1795269701.837457, NULL, 1795269701.588592, NULL, NULL, '{"step": 4, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.25556384183221975, 0.5, 0.1], "bound": [0.23000745764899777, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.25556384183221975], "observed": [0.12, 0.25556384183221975], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 2, 'a', '{"x": 0.008959321591294533, "y": 0.07244324569964056, "shape": "a", "n_steps": 5, "violation": -0.1, "fault": "raise"}', 1, 1, 0, NULL, 1795269700.072892, 'RuntimeError: the toy was told to fail', 1795269699.834816, NULL, NULL, '{"step": 0, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.08289372882151821, 0.5, 0.1], "bound": [0.0746043559393664, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.08289372882151821], "observed": [0.12, 0.08289372882151821], "count": [80, 20]}}');
INSERT INTO public.tuner_runs VALUES (1, 7, 'b', '{"x": 0.4422186351684851, "y": 0.9677911106376883, "shape": "b", "n_steps": 5, "violation": -0.1, "fault": "raise", "speed": 0.3}', 1, 1, 0, NULL, 1795269704.147261, 'RuntimeError: the toy was told to fail', 1795269703.991268, NULL, NULL, '{"step": 0, "pr": {"recall": [0.1, 0.2, 1.0], "precision": [0.12523392463449315, 0.5, 0.1], "bound": [0.11271053217104383, 0.4, 0.09], "threshold": [1.0, 0.0, -1.0]}, "calibration": {"predicted": [0.1, 0.12523392463449315], "observed": [0.12, 0.12523392463449315], "count": [80, 20]}}');
INSERT INTO public.tuner_schema VALUES (2);
INSERT INTO public.tuner_studies VALUES (1, 'toy', '{"study":"toy","description":"","trainer":"tests.toy:ToyTrainer","data":{"content":"toy","file":null},"decision":{"task":"toy","target_precision":0.4,"confidence":0.9,"min_selected":30,"range":null,"unit":"row"},"objective":{"metric":"valid/toy/pr_auc","direction":"maximize","upper":1.0},"n_trials":12,"seed":6,"config":{"x":0.9,"y":0.1,"shape":"a","n_steps":5,"violation":-0.1,"fault":"none"},"arms":{"a":{},"b":{"shape":"b","speed":0.3}},"space":{"dimensions":[{"path":"fault","kind":"categorical","low":null,"high":null,"log":false,"step":null,"choices":["none","other","raise"],"when":{}},{"path":"x","kind":"float","low":0.0,"high":1.0,"log":false,"step":null,"choices":[],"when":{}},{"path":"y","kind":"float","low":0.01,"high":1.0,"log":true,"step":null,"choices":[],"when":{}}]},"sampler":{"name":"tpe","n_startup_trials":4},"pruner":{"name":"median","min_completed":2,"warmup_steps":2,"patience":2,"max_steps":50},"max_failures_in_a_row":10,"notify":null}', '{"data_hash": "toy0000000000000", "source": "toy data ''toy''", "simulated": false, "rows": {"train": 100, "valid": 100, "calibrate": 100, "test": 100}, "files": {}, "preparation": {}, "simulation": null}', '0.2.0', 12, 0, 1795269697.505324, 1795269697.54516, 1795269697.572989, NULL);
INSERT INTO public.tuner_workers VALUES (1, 1, 'old-host', 'old-boot', 4711, 1, 'cpu', 1700000000, 1700000000, 1795269704.751691);
INSERT INTO public.tuner_workers VALUES (2, NULL, 'old-host', 'old-boot', 4711, 1, 'cpu', 1700000000, 1700000000, NULL);
INSERT INTO public.version_info VALUES (1, 12, '5.0.0');
SELECT pg_catalog.setval('public.studies_study_id_seq', 1, true);
SELECT pg_catalog.setval('public.study_directions_study_direction_id_seq', 1, true);
SELECT pg_catalog.setval('public.study_system_attributes_study_system_attribute_id_seq', 1, false);
SELECT pg_catalog.setval('public.study_user_attributes_study_user_attribute_id_seq', 1, false);
SELECT pg_catalog.setval('public.trial_heartbeats_trial_heartbeat_id_seq', 1, false);
SELECT pg_catalog.setval('public.trial_intermediate_values_trial_intermediate_value_id_seq', 30, true);
SELECT pg_catalog.setval('public.trial_params_param_id_seq', 30, true);
SELECT pg_catalog.setval('public.trial_system_attributes_trial_system_attribute_id_seq', 10, true);
SELECT pg_catalog.setval('public.trial_user_attributes_trial_user_attribute_id_seq', 10, true);
SELECT pg_catalog.setval('public.trial_values_trial_value_id_seq', 5, true);
SELECT pg_catalog.setval('public.trials_trial_id_seq', 10, true);
SELECT pg_catalog.setval('public.tuner_studies_id_seq', 1, true);
SELECT pg_catalog.setval('public.tuner_workers_id_seq', 2, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.studies
    ADD CONSTRAINT studies_pkey PRIMARY KEY (study_id);
ALTER TABLE ONLY public.study_directions
    ADD CONSTRAINT study_directions_pkey PRIMARY KEY (study_direction_id);
ALTER TABLE ONLY public.study_directions
    ADD CONSTRAINT study_directions_study_id_objective_key UNIQUE (study_id, objective);
ALTER TABLE ONLY public.study_system_attributes
    ADD CONSTRAINT study_system_attributes_pkey PRIMARY KEY (study_system_attribute_id);
ALTER TABLE ONLY public.study_system_attributes
    ADD CONSTRAINT study_system_attributes_study_id_key_key UNIQUE (study_id, key);
ALTER TABLE ONLY public.study_user_attributes
    ADD CONSTRAINT study_user_attributes_pkey PRIMARY KEY (study_user_attribute_id);
ALTER TABLE ONLY public.study_user_attributes
    ADD CONSTRAINT study_user_attributes_study_id_key_key UNIQUE (study_id, key);
ALTER TABLE ONLY public.trial_heartbeats
    ADD CONSTRAINT trial_heartbeats_pkey PRIMARY KEY (trial_heartbeat_id);
ALTER TABLE ONLY public.trial_heartbeats
    ADD CONSTRAINT trial_heartbeats_trial_id_key UNIQUE (trial_id);
ALTER TABLE ONLY public.trial_intermediate_values
    ADD CONSTRAINT trial_intermediate_values_pkey PRIMARY KEY (trial_intermediate_value_id);
ALTER TABLE ONLY public.trial_intermediate_values
    ADD CONSTRAINT trial_intermediate_values_trial_id_step_key UNIQUE (trial_id, step);
ALTER TABLE ONLY public.trial_params
    ADD CONSTRAINT trial_params_pkey PRIMARY KEY (param_id);
ALTER TABLE ONLY public.trial_params
    ADD CONSTRAINT trial_params_trial_id_param_name_key UNIQUE (trial_id, param_name);
ALTER TABLE ONLY public.trial_system_attributes
    ADD CONSTRAINT trial_system_attributes_pkey PRIMARY KEY (trial_system_attribute_id);
ALTER TABLE ONLY public.trial_system_attributes
    ADD CONSTRAINT trial_system_attributes_trial_id_key_key UNIQUE (trial_id, key);
ALTER TABLE ONLY public.trial_user_attributes
    ADD CONSTRAINT trial_user_attributes_pkey PRIMARY KEY (trial_user_attribute_id);
ALTER TABLE ONLY public.trial_user_attributes
    ADD CONSTRAINT trial_user_attributes_trial_id_key_key UNIQUE (trial_id, key);
ALTER TABLE ONLY public.trial_values
    ADD CONSTRAINT trial_values_pkey PRIMARY KEY (trial_value_id);
ALTER TABLE ONLY public.trial_values
    ADD CONSTRAINT trial_values_trial_id_objective_key UNIQUE (trial_id, objective);
ALTER TABLE ONLY public.trials
    ADD CONSTRAINT trials_pkey PRIMARY KEY (trial_id);
ALTER TABLE ONLY public.tuner_attempts
    ADD CONSTRAINT tuner_attempts_pkey PRIMARY KEY (study_id, number, attempt);
ALTER TABLE ONLY public.tuner_measurements
    ADD CONSTRAINT tuner_measurements_pkey PRIMARY KEY (study_id, number, step);
ALTER TABLE ONLY public.tuner_notifications
    ADD CONSTRAINT tuner_notifications_pkey PRIMARY KEY (study_id, event, key);
ALTER TABLE ONLY public.tuner_runs
    ADD CONSTRAINT tuner_runs_pkey PRIMARY KEY (study_id, number);
ALTER TABLE ONLY public.tuner_schema
    ADD CONSTRAINT tuner_schema_pkey PRIMARY KEY (version);
ALTER TABLE ONLY public.tuner_studies
    ADD CONSTRAINT tuner_studies_name_key UNIQUE (name);
ALTER TABLE ONLY public.tuner_studies
    ADD CONSTRAINT tuner_studies_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.tuner_workers
    ADD CONSTRAINT tuner_workers_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.version_info
    ADD CONSTRAINT version_info_pkey PRIMARY KEY (version_info_id);
CREATE UNIQUE INDEX ix_studies_study_name ON public.studies USING btree (study_name);
CREATE INDEX ix_trials_study_id ON public.trials USING btree (study_id);
CREATE INDEX ix_tuner_runs_study_id_ended_at ON public.tuner_runs USING btree (study_id, ended_at);
CREATE INDEX ix_tuner_workers_study_id ON public.tuner_workers USING btree (study_id);
ALTER TABLE ONLY public.study_directions
    ADD CONSTRAINT study_directions_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY public.study_system_attributes
    ADD CONSTRAINT study_system_attributes_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY public.study_user_attributes
    ADD CONSTRAINT study_user_attributes_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY public.trial_heartbeats
    ADD CONSTRAINT trial_heartbeats_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_intermediate_values
    ADD CONSTRAINT trial_intermediate_values_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_params
    ADD CONSTRAINT trial_params_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_system_attributes
    ADD CONSTRAINT trial_system_attributes_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_user_attributes
    ADD CONSTRAINT trial_user_attributes_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trial_values
    ADD CONSTRAINT trial_values_trial_id_fkey FOREIGN KEY (trial_id) REFERENCES public.trials(trial_id);
ALTER TABLE ONLY public.trials
    ADD CONSTRAINT trials_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.studies(study_id);
ALTER TABLE ONLY public.tuner_attempts
    ADD CONSTRAINT tuner_attempts_study_id_number_fkey FOREIGN KEY (study_id, number) REFERENCES public.tuner_runs(study_id, number) ON DELETE CASCADE;
ALTER TABLE ONLY public.tuner_measurements
    ADD CONSTRAINT tuner_measurements_study_id_number_fkey FOREIGN KEY (study_id, number) REFERENCES public.tuner_runs(study_id, number) ON DELETE CASCADE;
ALTER TABLE ONLY public.tuner_notifications
    ADD CONSTRAINT tuner_notifications_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.tuner_studies(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.tuner_runs
    ADD CONSTRAINT tuner_runs_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.tuner_studies(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.tuner_workers
    ADD CONSTRAINT tuner_workers_study_id_fkey FOREIGN KEY (study_id) REFERENCES public.tuner_studies(id) ON DELETE CASCADE;
